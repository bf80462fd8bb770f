import torch
from Model.model import Linear_LORA, MLLAMAConfig, MllamaForConditionalGeneration
from Model.processing_mllama import MllamaImageProcessor
from PIL import Image
from torch.cuda.amp import GradScaler, autocast
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer


class MultimodalDataset(Dataset):
    def __init__(self, data, image_processor):
        self.data = data
        self.image_processor = image_processor

    def __len__(self):
        return len(self.data)

    def __getitem__(self, idx):
        picture, text = self.data[idx]
        batch = self.image_processor([text], [picture.convert("RGB")], padding=True)
        labels = batch["input_ids"].clone()
        labels[labels == self.image_processor.image_token_id] = -100
        return {
            "input_ids": batch["input_ids"].squeeze(0),
            "pixel_values": batch["pixel Value"].squeeze(0),
            "attention_mask": batch["attention_mask"].squeeze(0),
            "labels": labels.squeeze(0),
        }


def convert(model, rank=4, alpha=8, dropout=0.1):
    for name, module in list(model.named_modules()):
        wanted = any(target in name for target in ["q_proj", "v_proj", "o_proj"])
        if isinstance(module, torch.nn.Linear) and wanted and "language_model" in name:
            parent = dict(model.named_modules())[".".join(name.split(".")[:-1])]
            lora = Linear_LORA(
                module.in_features, module.out_features, rank=rank, alpha=alpha, dropout=dropout
            )
            lora.linear.weight.data.copy_(module.weight.data)
            if module.bias is not None:
                lora.linear.bias.data.copy_(module.bias.data)
            setattr(parent, name.split(".")[-1], lora)
    for name, param in model.named_parameters():
        if "lora" not in name:
            param.requires_grad = False
    return model


torch.manual_seed(0)
vision_config = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
text_config = {
    "vocab_size": 2048,
    "hidden_size": 32,
    "n_heads": 4,
    "n_kv_groups": 2,
    "n_layers": 2,
    "hidden_dim": 64,
    "dtype": torch.float32,
}
config = MLLAMAConfig(vision_config=vision_config, text_config=text_config, projection_dim=32)
model = convert(MllamaForConditionalGeneration(config))
print("adapters:", sum(isinstance(module, Linear_LORA) for module in model.modules()))
print(
    "trainable:",
    all("lora_" in name for name, param in model.named_parameters() if param.requires_grad),
)

tokenizer = AutoTokenizer.from_pretrained("tokenizer")
image_processor = MllamaImageProcessor(
    tokenizer,
    num_image_token=config.text_config.num_image_tokens,
    image_size=config.vision_config.image_size,
)
pictures = [(Image.new("RGB", (40, 40), colour), "what colour is it?") for colour in ("red", "tan")]
dataloader = DataLoader(MultimodalDataset(pictures, image_processor), batch_size=2, shuffle=True)

optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2, weight_decay=0.01)
scaler = GradScaler()
model.train()
losses = []
for _ in range(40):
    for batch in dataloader:
        optimizer.zero_grad()
        with autocast():
            outputs = model(**batch)
            loss = outputs["loss"]
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
print("loss falls:", losses[-1] < losses[0] - 0.2)
