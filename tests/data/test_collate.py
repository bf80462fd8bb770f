"""Batches of examples: what is trained, and packed rows that are computed as if each were alone."""

import copy
import pickle

import pytest
import torch
from transformers import AutoProcessor, PreTrainedTokenizerFast

import mllama
import tiny
from mllama import MllamaImageProcessor
from mllama.data.collate import Collator
from mllama.data.rows import Example
from mllama.data.sources import open_examples
from processing import templates
from processing.test_answers import make
from tiny import data, folders, tokenizers

FAMILIES = [name for name in folders.MAKERS if name != "siglip"]


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> list[Example]:
    return list(open_examples(data.write(tmp_path_factory.mktemp("data"))))


def talk(*texts: str, system: str = "") -> Example:
    """A conversation of text: question, answer, question ..."""
    turns = [("user", "assistant")[index % 2] for index in range(len(texts))]
    messages = [*zip(turns, texts, strict=True)]
    messages = [("system", system), *messages] if system else messages
    content = [[{"type": "text", "text": text}] for _, text in messages]
    return Example(
        [{"role": role, "content": one} for (role, _), one in zip(messages, content, strict=True)],
        "here, row 7",
    )


def fitting(collator: Collator, examples: list[Example]) -> list[Example]:
    """Those that the model takes."""
    found = []
    for example in examples:
        try:
            collator.encode(example)
            found.append(example)
        except ValueError as error:
            assert str(error).startswith(example.where)
    return found


def loaded(family: str, family_folder):
    """A model of a folder, or one whose images stand beside the text, and its processor."""
    if family in ("prepend", "added layers"):
        processor = MllamaImageProcessor(tokenizers.make(), tiny.PATCHES, folders.SIDE)
        processor.image_seq_length = 0  # as for a folder of such a model
        text = {"vocab_size": len(processor.tokenizer), "max_position_embeddings": 512}
        if family == "prepend":
            return tiny.prepend(text=text), processor
        text |= {"num_hidden_layers": 4}
        options = {"fusion": "cross_attention", "cross_attention_every": 2}
        options |= {"vision_feature": "last", "image_token_index": None}
        return tiny.model(text=text, **options), processor
    return mllama.load(family_folder(family), dtype="float32", device="cpu")


@pytest.fixture(scope="module", params=[*FAMILIES, "added layers", "prepend"])
def family(request, family_folder):
    model, processor = loaded(request.param, family_folder)
    return request.param, open_gates(model), processor


def open_gates(model):
    """Gates of cross-attention layers begin closed, which would hide the images."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_gate"):
                parameter.fill_(0.7)
    return model


def trained(collator: Collator, batch) -> list[list[str]]:
    """Texts of the runs of labels of each row; checks that a label is its token's id."""
    rows = []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        marked = labels != -100
        assert torch.equal(ids[marked], labels[marked])
        runs, before = [], False
        for token, own in zip(ids.tolist(), marked.tolist(), strict=True):
            if own:
                runs = runs if before else [*runs, []]
                runs[-1].append(token)
            before = own
        rows.append([collator.tokenizer.decode(run) for run in runs])
    return rows


# What a model learns of `data.ROWS`.
ANSWERS = [["two", "red and blue"], ["a good day to you"], ["the second"], ["what?", "blue"]]
NOT_TAKEN = {"llama": (0, 2, 3), "gemma": (0, 2, 3), "paligemma": (0, 3)}
# Their templates write no prompt for an answer, whose head the model thus has to write.
WITH_HEADS = ("llama", "llava, clip", "mllama")


def test_only_answers_are_trained(family, examples):
    name, model, processor = family
    collator = Collator(model, processor)
    for index, (example, answers) in enumerate(zip(examples, ANSWERS, strict=True)):
        if index in NOT_TAKEN.get(name, ()):
            assert fitting(collator, [example]) == []
            continue
        found = trained(collator, collator([example]))[0]
        if name in WITH_HEADS:
            assert [text.strip() for text in found] == [f"assistant: {text}" for text in answers]
        else:
            assert found == [f"{text}<eos>" for text in answers]


def test_padding_and_images_are_not(family, examples):
    name, model, processor = family
    collator = Collator(model, processor)
    rows = fitting(collator, examples)
    if name == "prepend":
        rows = rows[:1]
    batch = collator(rows)
    lengths = [len(collator.encode(row)) for row in rows]
    assert batch["input_ids"].shape == (len(rows), max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert all(batch["attention_mask"][row, :n].all() for row, n in enumerate(lengths))
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    if collator.image_token_id is not None:
        images = batch["input_ids"] == collator.image_token_id
        assert (batch["labels"][images] == -100).all()
    alone = [collator([row]) for row in rows]
    for index, one in enumerate(alone):
        for key in ("input_ids", "labels"):
            assert torch.equal(batch[key][index, : lengths[index]], one[key][0])


def loss_and_gradients(model, batches: list[dict], count: int):
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = model(**batch, num_items_in_batch=torch.tensor(count)).loss
        loss.backward()
        total += float(loss.detach())
    return total, {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def check_same(model, one: list[dict], others: list[dict]) -> None:
    """Loss and gradients of the same rows in other batches."""
    count = sum(int((batch["labels"] != -100).sum()) for batch in one)
    assert count == sum(int((batch["labels"] != -100).sum()) for batch in others)
    (loss, gradients), (other, other_gradients) = (
        loss_and_gradients(model, batches, count) for batches in (one, others)
    )
    assert other == pytest.approx(loss, rel=1e-5)
    assert gradients.keys() == other_gradients.keys() and gradients
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert (gradient - other_gradients[name]).abs().max() <= 2e-5 * largest, name


def test_a_batch_is_its_rows_alone(family, examples):
    """With images, without, and with two of them in one batch."""
    name, model, processor = family
    collator = Collator(model, processor)
    rows = fitting(collator, examples)
    if name == "prepend":
        with pytest.raises(ValueError, match="row 1 has 1, photos.jsonl, row 2 has 0"):
            collator(rows)
        rows = [rows[0], rows[3]]  # as many images in each
    model = copy.deepcopy(model).train()
    check_same(model, [collator([row]) for row in rows], [collator(rows)])


def test_packed_rows_are_computed_as_alone(family, examples):
    name, model, processor = family
    if name == "prepend":
        with pytest.raises(ValueError, match="prepend"):
            Collator(model, processor, max_length=200, pack=True)
        return
    alone = Collator(model, processor)
    texts = [talk("hello", "a b c"), talk("hello a", "d")]
    rows = fitting(alone, [*examples, *texts])
    rows = rows[::-1]  # text first, so that images of later ones would be seen
    packed = Collator(model, processor, max_length=200, pack=True)
    batch = packed(rows)
    assert len(batch["input_ids"]) < len(rows) and "attention_mask" not in batch
    assert int((batch["position_ids"] == 0).sum()) >= len(rows)
    model = copy.deepcopy(model).train()
    check_same(model, [alone(rows)], [batch])
    shared = {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1])[None]}
    if (
        "token_type_ids" not in batch and len(batch["input_ids"]) == 1
    ):  # without the restarts they would see one another
        assert abs(model(**shared).loss - model(**batch).loss) > 1e-4
    for most in (80, 100):  # several packed rows, some with padding
        one_each = Collator(model, processor, max_length=most, pack=True)
        short = [row for row in rows if len(alone.encode(row)) <= most]
        batch = one_each(short)
        assert batch["input_ids"].shape[1] <= most
        check_same(model, [alone(short)], [batch])


@pytest.mark.parametrize("reference", ["meta", "hf"])
def test_packing_needs_meta_where_text_sees_all_images(family_folder, reference):
    for name in ("mllama", "added layers"):
        model, processor = loaded(name, family_folder)
        model = copy.copy(model)
        model.reference = reference
        if reference == "meta":
            assert Collator(model, processor, max_length=100, pack=True).pack
        else:
            with pytest.raises(ValueError, match="reference"):
                Collator(model, processor, max_length=100, pack=True)


GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}"
    "<|im_end|>{% endif %}\n{% endfor %}"
)
TALKS = [
    talk("a", "b"),
    talk("two plus two?", "four", "sure? four", "yes, 4"),
    talk("é—", "日本 é"),
]
TALKS += [talk("hi", "there", system="Be short.")]


@pytest.fixture(scope="module")
def llama():
    return tiny.model(text={"max_position_embeddings": 512})


def test_labels_are_transformers_own_where_the_template_marks_answers(llama):
    tokenizer = make(GENERATION)
    collator = Collator(llama, tokenizer)
    batch = collator(TALKS)
    for row, example in enumerate(TALKS):
        messages = [
            {"role": message["role"], "content": message["content"][0]["text"]}
            for message in example.messages
        ]
        stock = PreTrainedTokenizerFast.apply_chat_template(
            tokenizer,
            messages,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
        )
        length = stock["input_ids"].shape[1]
        expected = stock["input_ids"].masked_fill(
            torch.as_tensor(stock["assistant_masks"]) != 1, -100
        )
        assert torch.equal(batch["input_ids"][row, :length], stock["input_ids"][0])
        assert torch.equal(batch["labels"][row, :length], expected[0])
        assert (batch["labels"][row, length:] == -100).all()


def test_labels_with_images_are_transformers_own(tmp_path, examples):
    """The embedded model's template marks answers; its folder loads as stock LLaVA's processor."""
    model, processor = mllama.load(dtype="float32", device="cpu")
    processor.save_pretrained(tmp_path)
    stock = AutoProcessor.from_pretrained(tmp_path)
    assert type(stock).__module__.startswith("transformers.")
    collator = Collator(model, processor)
    for example in examples:
        expected = stock.apply_chat_template(
            example.messages,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
        )
        batch = collator([example])
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        mask = torch.as_tensor(expected["assistant_masks"]) == 1
        assert torch.equal(batch["labels"], expected["input_ids"].masked_fill(~mask, -100))


BY_HAND = {  # the labeled texts of `TALKS[1]`
    "CHATML": ["four<|im_end|>", "yes, 4<|im_end|>"],
    "GEMMA": ["four<end_of_turn>", "yes, 4<end_of_turn>"],
    "LLAMA2": ["  four </s>", "  yes, 4 </s>"],
    "VICUNA": [" four</s>", " yes, 4</s>"],
    "LLAVA": [" four", " yes, 4"],
    "MISTRAL": [" four</s>", " yes, 4</s>"],
    "LLAMA_VISION": ["four<|eot_id|>", "yes, 4<|eot_id|>"],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_labels_by_hand(llama, name):
    collator = Collator(llama, make(getattr(templates, name)))
    found = trained(collator, collator([TALKS[1]]))[0]
    assert [text.strip() for text in found] == [text.strip() for text in BY_HAND[name]]


def test_a_template_that_refuses_a_row_names_it(llama):
    collator = Collator(llama, make(templates.GEMMA))
    with pytest.raises(ValueError, match="^here, row 7: .*System"):
        collator([TALKS[3]])


def test_without_a_template_one_question_and_answer(family_folder):
    model, tokenizer = mllama.load(family_folder("gemma"), dtype="float32", device="cpu")
    collator = Collator(model, tokenizer)
    batch = collator([talk("hello a", "b c")])
    assert tokenizer.decode(batch["input_ids"][0]) == "<bos>hello ab c<eos>"
    assert trained(collator, batch) == [["b c<eos>"]]
    for row in (talk("a", "b", "c", "d"), talk("a", "b", system="c")):
        with pytest.raises(ValueError, match="here, row 7: .*chat template"):
            collator([row])


def test_a_tiled_model_without_a_template(family_folder, examples):
    model, processor = loaded("mllama", family_folder)
    processor = copy.copy(processor)
    with_template = Collator(model, processor)([examples[2]])
    processor.chat_template = None
    batch = Collator(model, processor)([examples[2]])
    assert trained(Collator(model, processor), batch) == [["the second<eos>"]]
    mask = batch["cross_attention_mask"]
    assert mask.shape[1] == batch["input_ids"].shape[1] and (mask[0, -1] == mask[0, -5]).all()
    assert mask[0, -1].any() and torch.equal(batch["pixel_values"], with_template["pixel_values"])


def test_truncation(family, examples):
    """Answers may be cut, images may not, nor every answer."""
    name, model, processor = family
    whole = Collator(model, processor)
    rows = fitting(whole, examples)
    refused = 0
    for example in rows:
        encoded = whole.encode(example)
        length, cut = len(encoded), 0
        for most in range(2, length + 2):
            try:
                row = Collator(model, processor, max_length=most).encode(example)
            except ValueError as error:
                assert str(error).startswith(example.where) and "max_length" in str(error)
                refused += 1
                continue
            cut += row.truncated > 0
            assert len(row) == min(most, length) and row.truncated == length - len(row)
            assert torch.equal(row.labels, encoded.labels[: len(row)])
            assert (row.labels != -100).any()
            token = whole.image_token_id
            if token is not None:
                assert (row.input_ids == token).sum() == (encoded.input_ids == token).sum()
            if "cross_attention_mask" in row.images:
                assert len(row.images["cross_attention_mask"]) == len(row)
        assert cut
    assert refused
    longest = max(len(whole.encode(example)) for example in rows)
    batch = Collator(model, processor, max_length=longest - 1)(rows[:1])
    assert model(**batch).loss.isfinite()


def test_rows_longer_than_the_model(llama):
    model = tiny.model(text={"max_position_embeddings": 40})
    tokenizer = make(templates.CHATML)
    with pytest.raises(ValueError, match="here, row 7: .* 40 positions"):
        Collator(model, tokenizer).encode(talk("a" * 40, "b"))
    with pytest.raises(ValueError, match="max_length"):
        Collator(model, tokenizer, max_length=41)


def test_images_for_a_text_model(family_folder, examples):
    model, tokenizer = mllama.load(family_folder("llama"), dtype="float32", device="cpu")
    with pytest.raises(ValueError, match="photos.jsonl, row 1: .*no images"):
        Collator(model, tokenizer).encode(examples[0])


def test_placeholders_in_a_text_are_rejected(family_folder):
    for name, text in (
        ("mllama", "<|image|>"),
        ("llava, clip", "<image>"),
        ("paligemma", "<image>"),
    ):
        model, processor = loaded(name, family_folder)
        for row in (talk(f"a {text} b", "c"), talk("a", f"b {text}")):
            with pytest.raises(ValueError, match="^here, row 7: "):
                Collator(model, processor).encode(row)


def test_arguments(llama, family_folder):
    tokenizer = make(templates.CHATML)
    for options, error in [
        ({"pack": True}, ValueError),
        ({"max_length": 1}, ValueError),
        ({"max_length": 2.0}, TypeError),
        ({"max_length": True}, TypeError),
    ]:
        with pytest.raises(error):
            Collator(llama, tokenizer, **options)
    with pytest.raises(ValueError, match="at least one"):
        Collator(llama, tokenizer)([])
    vision, images = mllama.load(family_folder("siglip"), dtype="float32", device="cpu")
    with pytest.raises(ValueError, match="decoder"):
        Collator(vision, images)


def test_workers_get_a_copy(family, examples):
    name, model, processor = family
    collator = Collator(model, processor, max_length=300)
    rows = fitting(collator, examples)[:1]
    again = pickle.loads(pickle.dumps(collator))
    ours, theirs = collator(rows), again(rows)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not any(isinstance(value, torch.nn.Module) for value in vars(again).values())


def test_a_model_in_wrappers(family_folder, examples):
    from peft import LoraConfig, get_peft_model

    model, processor = mllama.load(family_folder("llava, siglip"), dtype="float32", device="cpu")
    expected = Collator(model, processor)(examples)
    config = LoraConfig(r=2, target_modules=["q_proj"])
    for wrapped in (torch.compile(model), get_peft_model(model, config)):
        batch = Collator(wrapped, processor)(examples)
        assert all(torch.equal(batch[key], expected[key]) for key in expected)
