import torch
from modeling_gemma import KVCache, PaliGemmaForConditionalGeneration
from PIL import Image
from processing_paligemma import PaliGemmaProcessor
from utils import load_hf_model


def move_inputs_to_device(model_inputs: dict, device: str):
    return {k: v.to(device) for k, v in model_inputs.items()}


def sample_top_p(probs: torch.Tensor, p: float):
    probs_sort, probs_idx = torch.sort(probs, dim=-1, descending=True)
    probs_sum = torch.cumsum(probs_sort, dim=-1)
    probs_sort[probs_sum - probs_sort > p] = 0.0
    probs_sort.div_(probs_sort.sum(dim=-1, keepdim=True))
    return torch.gather(probs_idx, -1, torch.multinomial(probs_sort, num_samples=1))


def test_inference(
    model,
    processor,
    device,
    prompt,
    image_file_path,
    max_tokens_to_generate,
    temperature,
    top_p,
    do_sample,
):
    model_inputs = move_inputs_to_device(
        processor(text=[prompt], images=[Image.open(image_file_path)]), device
    )
    input_ids = model_inputs["input_ids"]
    attention_mask = model_inputs["attention_mask"]
    pixel_values = model_inputs["pixel_values"]
    kv_cache = KVCache()
    stop_token = processor.tokenizer.eos_token_id
    generated_tokens = []
    for _ in range(max_tokens_to_generate):
        outputs = model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            kv_cache=kv_cache,
        )
        kv_cache = outputs["kv_cache"]
        next_token_logits = outputs["logits"][:, -1, :]
        if do_sample:
            next_token = sample_top_p(torch.softmax(next_token_logits / temperature, dim=-1), top_p)
        else:
            next_token = torch.argmax(next_token_logits, dim=-1, keepdim=True)
        assert next_token.size() == (1, 1)
        next_token = next_token.squeeze(0)
        generated_tokens.append(next_token)
        if next_token.item() == stop_token:
            break
        input_ids = next_token.unsqueeze(-1)
        attention_mask = torch.cat(
            [attention_mask, torch.ones((1, 1), device=input_ids.device)], dim=-1
        )
    generated_tokens = torch.cat(generated_tokens, dim=-1)
    print("sampled ids:" if do_sample else "greedy ids:", generated_tokens.tolist())
    return prompt + processor.tokenizer.decode(generated_tokens, skip_special_tokens=True)


model, tokenizer = load_hf_model("paligemma", "cpu")
model = model.to("cpu").eval()
print("a PaliGemma:", isinstance(model, PaliGemmaForConditionalGeneration))
num_image_tokens = model.config.vision_config.num_image_tokens
image_size = model.config.vision_config.image_size
processor = PaliGemmaProcessor(tokenizer, num_image_tokens, image_size)
with torch.no_grad():
    text = test_inference(model, processor, "cpu", "describe", "cat.jpg", 8, 0.8, 0.9, False)
    print("goes on from the prompt:", text.startswith("describe"))
    test_inference(model, processor, "cpu", "describe", "cat.jpg", 8, 0.8, 0.9, True)
