"""What stands before a model in Meta's own folders: tokenizer.model and params.json, as
transformers' tokenizer or processor.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from mllama.processing.chat import with_answers
from mllama.processing.tiled import TiledImageProcessor, TiledProcessor
from mllama.processing.tokenizer import PATTERN, SPECIAL_TOKENS, Tokenizer, read_ranks

_BOS, _IMAGE = SPECIAL_TOKENS[0], "<|image|>"
# Meta's chat format: contents as they are, pictures where they stand.
_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first -%}{{ bos_token }}{%- endif -%}
{{ '<|start_header_id|>' + ('ipython' if message['role'] == 'tool' else message['role']) + '<|end_header_id|>\\n\\n' }}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}<|image|>{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- for call in message['tool_calls'] or [] -%}
{%- set call = call['function'] or call -%}
{{ '{"name": ' + call['name'] | tojson + ', "parameters": ' }}
{{- (call['arguments'] if call['arguments'] is string else call['arguments'] | tojson) + '}' }}
{%- endfor -%}
<|eot_id|>
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}
"""
# Of Meta's image transform: CLIP's mean and deviation.
_IMAGE_MEAN = [0.48145466, 0.4578275, 0.40821073]
_IMAGE_STD = [0.26862954, 0.26130258, 0.27577711]


def load_meta_processor(folder: str | Path) -> TiledProcessor | PreTrainedTokenizerFast:
    """Meta's tokenizer.model as transformers' fast tokenizer, with Meta's ids and chat format; for
    a vision model, the processor around it.

    A vision model's `<|image|>` is the first id behind the vocabulary, as Hugging Face's
    checkpoints have it and as Meta's code replaces its tokenizer's own id for it.

    Args:
        folder: with params.json and tokenizer.model.

    Raises:
        FileNotFoundError: one of them is not there.
        ValueError: one of them is broken.
    """
    folder = Path(folder)
    sizes = _vision_sizes(folder / "params.json")
    tokenizer = _fast_tokenizer(folder / "tokenizer.model", vision=sizes is not None)
    if sizes is None:
        return with_answers(tokenizer)
    size, tiles = sizes
    pictures = TiledImageProcessor(
        size={"height": size, "width": size},
        max_image_tiles=tiles,
        image_mean=_IMAGE_MEAN,
        image_std=_IMAGE_STD,
    )
    return TiledProcessor(pictures, tokenizer, chat_template=_CHAT_TEMPLATE)


def _vision_sizes(path: Path) -> tuple[int, int] | None:
    """A tile's height in pixels, and the most tiles of a picture; None for a text model."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content = content.get("model", content)
        size, tiles = content.get("vision_chunk_size", -1), content.get("vision_max_num_chunks", 4)
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON object as Meta writes it: {error}") from error
    return None if size == -1 else (size, tiles)


def fast_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The same vocabulary in transformers' fast tokenizer: the ids of `tokenizer.encode(text,
    allowed_special="all")`.

    BOS and EOS are named, and put into no text by themselves; it pads on the left and has no chat
    template.
    """
    ranks = {
        token: tokenizer.model.encode_single_token(token)
        for token in tokenizer.model.token_byte_values()
    }
    return _wrapped(_backend(ranks, sorted(tokenizer.special, key=tokenizer.special.get)))


def _fast_tokenizer(path: Path, vision: bool) -> PreTrainedTokenizerFast:
    names = SPECIAL_TOKENS
    if vision:  # the names behind <|image|> move up, and it goes last
        before = SPECIAL_TOKENS.index(_IMAGE)
        names = (
            *names[:before],
            *names[before + 1 :],
            f"<|reserved_special_token_{len(names) - before + 1}|>",
            _IMAGE,
        )
    backend = _backend(read_ranks(path), names)
    if not vision:  # there the processor puts it in front, and stock transformers' would double it
        first = processors.TemplateProcessing(
            single=f"{_BOS} $A", special_tokens=[(_BOS, backend.token_to_id(_BOS))]
        )
        backend.post_processor = processors.Sequence([backend.post_processor, first])
    return _wrapped(backend, chat_template=_CHAT_TEMPLATE)


def _backend(ranks: dict[bytes, int], names: Sequence[str]) -> Backend:
    """Byte pairs in the order of their ranks, then the special tokens of these names."""
    backend = _Converter(ranks, pattern=PATTERN).converted()
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    return backend


def _wrapped(backend: Backend, **options) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=_BOS,
        eos_token="<|end_of_text|>",
        pad_token="<|finetune_right_pad_id|>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        **options,
    )


class _Converter(TikTokenConverter):
    """transformers' converter on ranks: its own reading needs tiktoken, and takes stale copies from
    the temporary folder.
    """

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: dict[bytes, int]) -> dict[bytes, int]:
        return tiktoken_url
