"""The rows of a run, read as its settings say."""

from mllama.data.collate import Collator
from mllama.data.sources import Examples, open_examples
from mllama.train.settings import TrainSettings


def open_rows(
    settings: TrainSettings, collator: Collator, key: str = "data", most: int | None = None
) -> Examples:
    """Open the data of a key. With `skip_bad_rows`, rows that cannot be trained on are left out.

    Args:
        settings: the run's.
        collator: the run's.
        key: "data" or "eval_data".
        most: how many rows are needed, the first ones. Default: all.

    Raises:
        TypeError, ValueError, FileNotFoundError: as `open_examples`, or all rows are bad.
    """
    split = settings.split if key == "data" else settings.eval_split
    try:
        found = open_examples(
            getattr(settings, key), settings.image_folder, settings.question, split
        )
        return found.leave_out_bad(collator.encode, most) if settings.skip_bad_rows else found
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
