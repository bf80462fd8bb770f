"""Scripts around `MllamaForConditionalGeneration`, as READMEs of older files write them."""

import os

import pytest
import torch
from PIL import Image

import twins
from dropin import older
from mllama.dropin.model import KVCache, MllamaForConditionalGeneration
from mllama.dropin.processing_mllama import MllamaImageProcessor
from mllama.dropin.processing_paligemma import PaliGemmaProcessor
from mllama.dropin.processing_siglip import paligemmaProcessor

large = pytest.mark.skipif(
    os.environ.get("MLLAMA_LARGE_TESTS") != "1",
    reason="needs 8 GB and minutes: set MLLAMA_LARGE_TESTS=1",
)

SCRIPT = """
import torch
import model, modeling_gemma, Model.model, mllama.dropin.model, mllama.dropin.utils, siglip
from Model import MLLAMAConfig, MllamaForConditionalGeneration
from Model.model import KVCache, Linear_LORA, Llama3ForCausalLM
from Model.processing_mllama import MllamaImageProcessor
from Model.siglip import SiglipModel
from Model.utils import load_hf_model as tolerant
from Tools.swiglu.FusedSwiglu import FusedFeedForward, FusedSwiGLU, convert_feedforward_to_fused
from utils import load_hf_model as strict
import Tools.rmsnorm, Tools.swiglu, mllama.dropin.Tools

assert model.MLLAMAConfig is MLLAMAConfig is mllama.dropin.model.MLLAMAConfig
assert model.MllamaForConditionalGeneration is MllamaForConditionalGeneration is Model.model.MllamaForConditionalGeneration
assert model.KVCache is KVCache is modeling_gemma.KVCache and siglip.SiglipModel is SiglipModel
assert strict is mllama.dropin.utils.load_hf_model and strict is not tolerant
assert Tools.FusedSwiGLU is FusedSwiGLU is mllama.dropin.Tools.FusedSwiGLU is Tools.swiglu.FusedSwiGLU
assert Tools.rmsnorm.FusedRMSNorm is Tools.FusedRMSNorm and model.FusedFeedforward is FusedFeedForward
try:
    from Tools import rope_cuda, rmsnorm_cuda
except ImportError:
    print("falls back")
assert model.MultiModalProjector and model.FusedFeedforward and modeling_gemma.PaliGemmaForConditionalGeneration


def apply_lora(module, rank=4, alpha=8, dropout=0.05):
    for name, child in module.named_children():
        if isinstance(child, torch.nn.Linear):
            lora = Linear_LORA(child.in_features, child.out_features, rank, alpha, dropout)
            lora.linear.weight.data.copy_(child.weight.data)
            setattr(module, name, lora)
        else:
            apply_lora(child, rank, alpha, dropout)


vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
text = {"vocab_size": 99, "hidden_size": 64, "n_heads": 4, "n_layers": 2, "hidden_dim": 96, "n_kv_groups": 2}
for dtype, error in ((torch.float32, 1e-5), (torch.float16, 1e-2)):
    torch.manual_seed(0)
    config = MLLAMAConfig(vision_config=vision, text_config=text | {"dtype": dtype}, projection_dim=64)
    model = MllamaForConditionalGeneration(config)
    ids = torch.tensor([[128256] * 4 + [5, 6, 7, 8, 9]])
    pixels, labels = torch.randn(1, 3, 16, 16), ids.masked_fill(ids == 128256, -100)
    before = model.eval()(ids, pixels)["logits"].float()
    apply_lora(model.language_model)
    assert torch.allclose(before, model.eval()(ids, pixels)["logits"].float(), atol=error)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora" in name
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * 7
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    model.train()
    losses = []
    for _ in range(30):
        loss = model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), labels=labels)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.8, losses  # all that the frozen head allows
    assert not torch.allclose(before, model.eval()(ids, pixels)["logits"].float(), atol=0.1)
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
    torch.save(model.state_dict(), "ckpt.pt")
    after = model(ids, pixels)["logits"]
    model.language_model.layers[0].self_attn.q_proj.lora_b.weight.data.zero_()
    model.load_state_dict(torch.load("ckpt.pt"))
    assert torch.equal(model(ids, pixels)["logits"], after)
print("adapted")
"""


@pytest.mark.parametrize("kind", [MllamaImageProcessor, paligemmaProcessor, PaliGemmaProcessor])
@pytest.mark.parametrize("inside", [True, False], ids=["in the vocabulary", "outside of it"])
class TestWithAProcessor:
    """The processor knows the id of `<image>`, the config does not."""

    @pytest.fixture
    def processor(self, kind, make_tokenizer):
        return kind(make_tokenizer(), twins.PATCHES, older.VISION["image_size"])

    @pytest.fixture
    def model(self, processor, inside):
        vocabulary = len(processor.tokenizer) if inside else processor.image_token_id
        return twins.randomise(
            MllamaForConditionalGeneration(older.config(text={"vocab_size": vocabulary}))
        ).eval()

    def test_another_picture_changes_the_logits(self, processor, model):
        pictures = [Image.new("RGB", (20, 30), colour) for colour in ("red", "white")]
        first, second = (
            model(**processor(["hello"], [picture], padding=True))["logits"] for picture in pictures
        )
        assert (
            first.shape == (1, first.shape[1], model.vocab_size)
            and (first - second).abs().max() > 0.1
        )

    def test_both_of_a_batch_count(self, processor, model):
        red, white = (Image.new("RGB", (20, 30), colour) for colour in ("red", "white"))
        prompts = ["hello", "hello, what colour is it?"]
        same, other = (
            model(**processor(prompts, pair, padding=True))["logits"]
            for pair in ([red, red], [red, white])
        )
        torch.testing.assert_close(same[0], other[0])
        assert (same[1] - other[1]).abs().max() > 0.1

    def test_token_by_token(self, processor, model):
        batch, cache, said = (
            processor(["hello"], [Image.new("RGB", (20, 30), "red")]),
            KVCache(),
            [],
        )
        ids, mask = batch["input_ids"], batch["attention_mask"]
        for _ in range(8):
            output = model(
                input_ids=ids,
                pixel_values=batch["pixel Value"],
                attention_mask=mask,
                kv_cache=cache,
            )
            ids = output["logits"][:, -1].argmax(-1, keepdim=True)
            mask = torch.cat([mask, torch.ones(1, 1)], 1)
            said.append(int(ids))
        whole = model.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert whole[0, -8:].tolist() == said

    def test_one_that_was_not_expanded_is_refused(self, processor, model):
        ids = processor.tokenizer(["<image>hello"], return_tensors="pt")["input_ids"]
        assert processor.image_token_id in ids
        with pytest.raises(
            ValueError, match="expand each <image> with the processor, MllamaImageProcessor"
        ):
            model(ids, twins.pictures(1))

    def test_runs_of_another_length_are_refused(self, kind, processor, model):
        batch = kind(processor.tokenizer, twins.PATCHES - 1, older.VISION["image_size"])(
            ["hello"], [Image.new("RGB", (20, 30), "red")]
        )
        with pytest.raises(ValueError, match="not in runs of 4 for each of 1 pictures"):
            model(**batch)


def test_names_where_scripts_look_for_them_and_lora_by_hand(run_python, tmp_path):
    done = run_python("-c", f"import mllama.dropin\n{SCRIPT}", cwd=tmp_path)
    assert done.stdout == "falls back\nadapted\n", done.stderr


def test_it_trains_on_its_own():
    model, ids = older.model(), older.prompt(*twins.tokens(6))
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(ids, twins.pictures(1), labels=ids.masked_fill(ids == older.IMAGE, -100))[
            "loss"
        ]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@large
def test_the_size_that_readmes_build(run_python, tmp_path):
    script = """
import resource, time, torch
from model import MLLAMAConfig, MllamaForConditionalGeneration
vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
vision |= {"image_size": 224, "patch_size": 16}
text = {"vocab_size": 128256, "hidden_size": 4096, "n_heads": 32, "n_layers": 16, "hidden_dim": 8192, "max_position_embeddings": 2048}
begin = time.time()
config = MLLAMAConfig(vision_config=vision, text_config=text, projection_dim=2048)
model = MllamaForConditionalGeneration(config).eval()
built = time.time() - begin
ids = torch.cat([torch.full((1, config.text_config.num_image_tokens), 128256), torch.randint(0, 128256, (1, 16))], 1)
with torch.no_grad():
    logits = model(input_ids=ids, pixel_values=torch.randn(1, 3, 224, 224), attention_mask=torch.ones_like(ids))["logits"]
assert logits.shape == (1, 212, 128256) and logits.dtype == torch.float16 and bool(logits.isfinite().all())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
billions = sum(parameter.numel() for parameter in model.parameters()) / 1e9
print(f"{billions:.2f} B parameters, built in {built:.0f} s, forward {time.time() - begin - built:.0f} s, peak {peak:.1f} GiB")
assert 3.3 < billions < 3.6 and peak < 24e9 / 2**30
"""
    done = run_python("-c", f"import mllama.dropin\n{script}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
