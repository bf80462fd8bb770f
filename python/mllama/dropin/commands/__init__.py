"""The command lines of older projects, each a module with `main(arguments) -> exit code`. `python
-m mllama.dropin NAME` runs one.

Errors are told as `mllama`'s own: one line on stderr and exit code 2.
"""

# By the file that had the command line; NAME is that path, or its last part without the suffix.
COMMANDS = {
    "Inference/Inference.py": "vision",
    "inference.py": "answer",
    "dev/inference.py": "answer",
    "dev/launch_inference.sh": "launch",
    "dev/get_tokenizer.py": "get_tokenizer",
    "scripts/convert_lo_ra.py": "convert_lo_ra",
}
