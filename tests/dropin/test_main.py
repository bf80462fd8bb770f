"""`python -m mllama.dropin`: the folder for PYTHONPATH, and scripts run as Python runs them."""

import sys
from pathlib import Path

import pytest

import mllama.dropin
from mllama.dropin.__main__ import main
from mllama.dropin.commands import COMMANDS


@pytest.fixture
def folder(tmp_path):
    """Two scripts side by side in a folder that is not the current one."""
    place = tmp_path / "scripts"
    place.mkdir()
    (place / "beside.py").write_text("WHERE = __file__\n")
    (place / "script.py").write_text(
        "import sys\n"
        "import beside\n"
        "class Here: pass\n"
        "if __name__ == '__main__':\n"
        "    import pickle\n"
        "    assert pickle.loads(pickle.dumps(Here())).__class__ is Here\n"
        "    print(sys.argv[1:], sys.path[0], __file__)\n"
        "    sys.exit(int(sys.argv[1]) if sys.argv[1].isdigit() else sys.argv[1])\n"
    )
    return place


def test_prints_the_folder_for_pythonpath(run_python, tmp_path):
    ended = run_python("-m", "mllama.dropin", cwd=tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"{mllama.dropin.FOLDER}\n", "")
    assert (Path(ended.stdout.strip()) / "siglip.py").is_file()


def test_a_file_beside_the_script_wins(run_python, tmp_path):
    (tmp_path / "model.py").write_text("NAME = 'my own'\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import importlib.util, model\nprint(model.NAME, importlib.util.find_spec('siglip').origin)\n"
    )
    said = f"my own {Path(mllama.dropin.FOLDER) / 'siglip.py'}\n"
    assert run_python(script, cwd="/", path=mllama.dropin.FOLDER).stdout == said
    assert run_python("-m", "mllama.dropin", script, cwd="/").stdout == said


def test_a_file_beside_a_notebook_wins(run_python, tmp_path):
    (tmp_path / "model.py").write_text("NAME = 'my own'\n")
    # IPython puts the current folder before site-packages
    path = "import sys\nsys.path = [*sys.path[1:], '']\n"
    said = run_python(
        "-c",
        path
        + "import mllama.dropin, model, siglip\nprint(model.NAME, siglip.SiglipModel.__name__)",
        cwd=tmp_path,
    )
    assert said.stdout == "my own SiglipModel\n", said.stderr


@pytest.mark.parametrize("code", [0, 3])
def test_a_script_runs_as_python_runs_it(run_python, folder, tmp_path, code):
    ended = run_python(
        "-m", "mllama.dropin", folder / "script.py", code, "--flag", "a b", cwd=tmp_path
    )
    assert (ended.returncode, ended.stderr) == (code, "")
    assert ended.stdout == f"['{code}', '--flag', 'a b'] {folder} {folder / 'script.py'}\n"
    plain = run_python(folder / "script.py", code, "--flag", "a b", cwd=tmp_path)
    assert (plain.returncode, plain.stdout) == (ended.returncode, ended.stdout)


def test_what_a_script_raises_is_shown(run_python, folder, tmp_path):
    ended = run_python("-m", "mllama.dropin", folder / "script.py", "words", cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (1, "words\n")
    (folder / "broken.py").write_text("def deep():\n    raise KeyError('what')\n\ndeep()\n")
    ended = run_python("-m", "mllama.dropin", folder / "broken.py", cwd=tmp_path)
    assert ended.returncode == 1 and ended.stderr.endswith(
        "in deep\n    raise KeyError('what')\nKeyError: 'what'\n"
    )


def test_what_is_no_script_is_one_line(capsys, tmp_path):
    for name in ("nowhere.py", str(tmp_path), "elsewhere/inference.py", "--folder"):
        assert main([name]) == 2
        out, err = capsys.readouterr()
        assert (out, err) == (
            "",
            f"mllama.dropin: error: there is no script {name!r}, and no command of that name (see --help)\n",
        )


def test_help_names_the_commands(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {Path(path).stem} " in printed and path in printed for path in COMMANDS)


def test_a_script_of_a_commands_name_is_the_readers_own(monkeypatch, tmp_path, capsys):
    (tmp_path / "inference.py").write_text("print('my own')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mllama.dropin"])
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert main(["inference.py"]) == 0 and capsys.readouterr().out == "my own\n"
