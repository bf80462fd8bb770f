"""What `--timings` prints of an answer."""

from typing import Any

from mllama.runtime.completion import Generation


def timing_fields(load_seconds: float, made: Generation) -> dict[str, Any]:
    """The field `timings` of --json. Rates are None where nothing was computed."""
    found, accepted = made.timings, made.num_accepted_tokens
    passes = found.decode.count - accepted
    fields = {
        "load_seconds": load_seconds,
        "images": found.image.count,
        "image_seconds": found.image.seconds,
        "prompt_tokens": made.num_prompt_tokens,
        "reused_tokens": made.num_reused_tokens,
        "prompt_seconds": found.prompt.seconds,
        "prompt_tokens_per_second": found.prompt.rate,
        "first_token_seconds": found.first_token_seconds,
        "decode_tokens": found.decode.count,
        "decode_seconds": found.decode.seconds,
        "decode_tokens_per_second": found.decode.rate,
        "drafted_tokens": made.num_drafted_tokens,
        "accepted_tokens": accepted,
        "tokens_per_pass": found.decode.count / passes if passes else None,
        "total_seconds": found.total_seconds,
    }
    return {name: round(x, 6) if isinstance(x, float) else x for name, x in fields.items()}


def timing_table(fields: dict[str, Any]) -> str:
    """The same as lines, one per stage."""

    def line(stage: str, text: str = "") -> str:
        seconds = fields[f"{stage.replace(' ', '_')}_seconds"]
        rate = fields.get(f"{stage}_tokens_per_second")
        speed = "" if rate is None else f", {rate:.1f} tokens/s"
        return f"{stage:<12}{seconds * 1000:>10.1f} ms  {text}{speed}".rstrip()

    said = f"{fields['decode_tokens']} tokens"
    if fields["drafted_tokens"]:
        said += (
            f", {fields['accepted_tokens']} of {fields['drafted_tokens']} drafts accepted, "
            f"{fields['tokens_per_pass']:.2f} tokens a pass"
        )
    read = f"{fields['prompt_tokens']} tokens, {fields['reused_tokens']} of them reused"
    return "\n".join(
        (
            line("load"),
            line("image", f"{fields['images']} encoded before the prompt"),
            line("prompt", read),
            line("decode", said),
            line("total"),
            line("first token"),
        )
    )
