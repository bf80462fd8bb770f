"""LoRA adapters for a model folder: `python -m mllama.dropin convert_lo_ra`."""

import sys

from mllama.dropin.commands import convert_lo_ra


def main(arguments: list[str] | None = None) -> None:
    """Run a command; an error is one line on stderr."""
    try:
        convert_lo_ra(sys.argv[1:] if arguments is None else arguments)
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"convert_lo_ra: error: {error}")


if __name__ == "__main__":
    main()
