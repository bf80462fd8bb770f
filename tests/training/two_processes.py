"""What tests/training/test_distributed.py runs by torchrun: one folder, two processes, the results
of each as JSON.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import mllama
import tiny
from mllama import MllamaForConditionalGeneration

warnings.simplefilter("ignore")
KINDS = ("own", "peft", "full")
IDS = torch.tensor([tiny.tokens(6)])


def converted() -> MllamaForConditionalGeneration:
    model = tiny.model().requires_grad_(False)
    torch.manual_seed(1)
    for layer in mllama.convert_linears_to_lora(
        model.language_model, 2, 4, target_module_names=["q_proj", "up_proj"]
    ).values():
        torch.nn.init.normal_(layer.lora_b.weight, std=0.2)
    return model


def zeroed() -> MllamaForConditionalGeneration:
    model = converted()
    with torch.no_grad():
        for parameter in mllama.lora_parameters(model):
            parameter.zero_()
    return model


def ddp(model):
    return DistributedDataParallel(model)


def fsdp1(model):
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def fsdp2(model):
    for layer in model.language_model.layers:
        fully_shard(layer)
    return fully_shard(model)


WRAPPERS = {
    "ddp": ddp,
    "fsdp1": fsdp1,
    "fsdp2": fsdp2,
    "compiled": torch.compile,
    "compiled ddp": lambda model: torch.compile(ddp(model)),
}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def adapters(folder: Path) -> dict[str, bool]:
    """Saved from a wrapped model, read by a plain one, and the reverse, in both formats; whole
    models likewise.
    """
    plain, found = converted().eval(), {}
    expected = logits(plain)
    mllama.save_lora(plain, folder / f"plain-{distributed.get_rank()}.safetensors")
    for name, wrap in WRAPPERS.items():
        wrapped = wrap(converted().eval())
        for format, place in (("mllama", f"{name}.safetensors"), ("peft", name)):
            if "fsdp" in name or distributed.get_rank() == 0:
                mllama.save_lora(wrapped, folder / place, format=format)
            distributed.barrier()
            again = tiny.model()
            mllama.load_lora(again, folder / place)
            found[f"{name}, written, {format}"] = torch.equal(logits(again), expected)
        empty = wrap(zeroed().eval())
        mllama.load_lora(empty, folder / f"plain-{distributed.get_rank()}.safetensors")
        mllama.save_lora(empty, folder / f"again {name}.safetensors")
        distributed.barrier()
        again = tiny.model()
        mllama.load_lora(again, folder / f"again {name}.safetensors")
        found[f"{name}, read"] = torch.equal(logits(again), expected)
    return found


def whole_models(folder: Path) -> dict[str, bool]:
    plain, found = tiny.model(), {}
    expected = logits(plain)
    for name, wrap in WRAPPERS.items():
        if name == "fsdp1":  # its state dict is asked for under FSDP's own context
            continue
        wrapped = wrap(tiny.model())
        state, again = wrapped.state_dict(), tiny.model(seed=5)
        again.load_state_dict(state)
        found[f"{name}, state dict"] = torch.equal(logits(again), expected)
        inner = wrapped.module if "ddp" in name else wrapped
        inner.save_pretrained(
            folder / f"whole {name}", is_main_process=distributed.get_rank() == 0, state_dict=state
        )
        distributed.barrier()
        again = MllamaForConditionalGeneration.from_pretrained(folder / f"whole {name}")
        found[f"{name}, folder"] = torch.equal(logits(again), expected)
    sharded = fsdp2(tiny.model(seed=5))
    sharded.load_state_dict(plain.state_dict())
    sharded.save_pretrained(folder / "whole again")
    distributed.barrier()
    found["fsdp2, whole, read"] = torch.equal(
        logits(MllamaForConditionalGeneration.from_pretrained(folder / "whole again")), expected
    )
    return found


def learner(kind: str) -> torch.nn.Module:
    """What learns: the package's LoRA, PEFT's or all parameters."""
    import peft

    if kind == "own":
        return converted()
    model = tiny.model()
    torch.manual_seed(1)
    return (
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
        if kind == "peft"
        else model
    )


def losses(kind: str, folder: Path, rows: int) -> list[float]:
    """Of transformers' Trainer, so many rows a process and step."""
    from transformers import Trainer, TrainingArguments

    def batch(rows):
        found = tiny.batch(*rows)
        return found | {"labels": found["input_ids"]}

    options = {
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "logging_steps": 1,
    }
    options |= {
        "max_steps": 2,
        "per_device_train_batch_size": rows,
        "learning_rate": 0.01,
        "save_steps": 2,
    }
    data = [tiny.tokens(7, seed=seed) for seed in range(8)]
    arguments = TrainingArguments(
        str(folder / f"trained {kind}"), ddp_find_unused_parameters=True, **options
    )
    run = Trainer(learner(kind), arguments, train_dataset=data, data_collator=batch)
    run.train()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    found = {
        "adapters": adapters(folder),
        "whole models": whole_models(folder),
        "trained": {kind: losses(kind, folder, 2) for kind in KINDS},
    }
    (folder / f"rank-{distributed.get_rank()}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
