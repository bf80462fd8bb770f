"""The preprocessor of Meta's own folders: tokenizer.model and params.json."""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from mllama.processing.preprocessors import TiledPreprocessor
from mllama.processing.square import CLIP_MEAN, CLIP_STD
from mllama.processing.text_tokenizer import TextTokenizer
from mllama.processing.tiled import read_tiles
from mllama.processing.tokenizer import PATTERN, SPECIAL_TOKENS, read_ranks

BOS, _IMAGE = SPECIAL_TOKENS[0], "<|image|>"
NAMED = {"bos_token": BOS, "eos_token": "<|end_of_text|>", "pad_token": "<|finetune_right_pad_id|>"}
# Meta's chat format: contents unchanged, images in place.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first -%}{{ bos_token }}{%- endif -%}
{{ '<|start_header_id|>' + ('ipython' if message['role'] == 'tool' else message['role']) }}
{{- '<|end_header_id|>\\n\\n' }}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}<|image|>
{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- for call in message['tool_calls'] or [] -%}
{%- set call = call['function'] or call -%}
{{ '{"name": ' + call['name'] | tojson + ', "parameters": ' }}
{{- (call['arguments'] if call['arguments'] is string else call['arguments'] | tojson) + '}' }}
{%- endfor -%}
<|eot_id|>
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}
"""


def load_meta_preprocessor(folder: str | Path) -> TiledPreprocessor | TextTokenizer:
    """Load Meta's tokenizer.model with Meta's ids and chat format, inside a preprocessor for a
    vision model.

    A vision model's `<|image|>` is the first id after the vocabulary, as in Hugging Face's
    checkpoints and Meta's code, which replaces the tokenizer's own id.

    Args:
        folder: a folder with params.json and tokenizer.model.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is broken.
    """
    folder = Path(folder)
    settings = read_tile_settings(folder / "params.json")
    backend = meta_backend(folder / "tokenizer.model", vision=settings is not None)
    tokenizer = TextTokenizer(backend, NAMED, CHAT_TEMPLATE)
    if settings is None:
        return tokenizer
    return TiledPreprocessor(tokenizer, read_tiles(settings), CHAT_TEMPLATE)


def read_tile_settings(path: Path) -> dict | None:
    """The MllamaImageProcessor settings in params.json; None for a text model.

    Raises:
        ValueError: the file is not in Meta's format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content = content.get("model", content)
        size, tiles = content.get("vision_chunk_size", -1), content.get("vision_max_num_chunks", 4)
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON object as Meta writes it: {error}") from error
    if size == -1:
        return None
    return {
        "size": {"height": size, "width": size},
        "max_image_tiles": tiles,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }


def meta_backend(path: Path, vision: bool) -> Tokenizer:
    """The byte pairs of a tokenizer.model, and Meta's special tokens.

    A text model's tokenizer adds BOS; a vision model's does not, because the processor does.
    """
    names: Sequence[str] = SPECIAL_TOKENS
    if vision:  # names after <|image|> move up, and it comes last
        before = SPECIAL_TOKENS.index(_IMAGE)
        names = (
            *names[:before],
            *names[before + 1 :],
            f"<|reserved_special_token_{len(names) - before + 1}|>",
            _IMAGE,
        )
    backend = byte_pairs(read_ranks(path), names)
    if not vision:
        first = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))]
        )
        backend.post_processor = processors.Sequence([backend.post_processor, first])
    return backend


def byte_pairs(ranks: dict[bytes, int], names: Sequence[str]) -> Tokenizer:
    """Byte pairs in the order of their ranks, followed by the special tokens."""
    letters = _letters()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [pair for pair in cuts if pair[0] in ranks and pair[1] in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(spelled(left), spelled(right)) for left, right in pairs]
    vocabulary = {spelled(token): rank for token, rank in ranks.items()}
    backend = Tokenizer(BPE(vocabulary, merges, fuse_unk=False, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    return backend


def _letters() -> list[str]:
    """The letter that byte-level BPE uses for each byte: itself if printable, else the next one
    above 255 (GPT-2's bytes_to_unicode).
    """
    shown = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)}
    shown |= set(range(ord("®"), ord("ÿ") + 1))
    others = iter(range(256, 512))
    return [chr(byte if byte in shown else next(others)) for byte in range(256)]
