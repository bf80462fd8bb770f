"""The embedded model answers the demo's questions right; `make demo` says so."""

import demo


def test_every_answer_is_right(capsys):
    code, printed = demo.main(), capsys.readouterr()
    assert code == 0, printed.out
    assert "✓" in printed.out and "✗" not in printed.out


def test_a_wrong_answer_is_told(capsys, monkeypatch):
    monkeypatch.setattr("mllama.ask", lambda image, question: "seven")
    assert demo.main() == 1 and "✗" in capsys.readouterr().out
