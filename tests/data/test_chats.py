"""Conversations as training data: the tokens that `transformers` makes of them, and a loss on answers alone."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from eellm.config.compose import compose
from eellm.data.corpus import Corpus, prepare_corpus
from eellm.errors import DataError
from eellm.mcore.datasets import open_documents

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ["the", "old", "sea", "was", "calm", "that", "day", "and", "nobody", "said", "a", "word", "about", "it"]


def conversation(draw: random.Random) -> list[dict[str, str]]:
    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 9)))

    messages = [{"role": "system", "content": text()}] if draw.random() < 0.3 else []
    for _ in range(draw.randint(1, 3)):
        messages += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
    return messages + ([{"role": "user", "content": text()}] if draw.random() < 0.3 else [])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer with its template, and conversations."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet)
    backend.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    draw = random.Random(1)
    chats = [conversation(draw) for _ in range(60)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return tmp_path


def prepared(folder: Path, *overrides: str) -> Corpus:
    data = ["task=train", "data=chats", f"data.path={folder / 'chats.jsonl'}", "data.split=[0.7,0.3]", "data.sequence_length=16"]
    tokenizer = ["tokenizer=file", f"tokenizer.path={folder / 'tokenizer.json'}", f"data.cache_dir={folder / 'cache'}"]
    return prepare_corpus(compose([*data, *tokenizer, *overrides]))


def expected(folder: Path, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Tokens of the whole by `transformers`, and by its own prefixes which of them the assistant says."""
    oracle = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), chat_template=TEMPLATE)
    whole = oracle.apply_chat_template(messages, tokenize=False)
    said = np.zeros(len(whole), dtype=int)
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            begin = len(oracle.apply_chat_template(messages[:place], tokenize=False, add_generation_prompt=True))
            said[begin : begin + len(f"{message['content']}<|im_end|>\n")] = 1
    encoded = oracle(whole, add_special_tokens=False, return_offsets_mapping=True)
    return encoded["input_ids"], [int(said[begin]) for begin, _ in encoded["offset_mapping"]]


def test_tokens_and_answers_are_those_of_transformers(folder: Path) -> None:
    (part,) = prepared(folder).parts
    tokens, answers = (open_documents(Path(part.prefix).with_name(name)) for name in ("tokens", "answers"))
    chats = [json.loads(line)["messages"] for line in (folder / "chats.jsonl").read_text().splitlines()]
    assert len(tokens) == len(answers) == len(chats)
    for number, chat in enumerate(chats):
        ids, said = expected(folder, chat)
        assert tokens[number].tolist() == [*ids, 0]
        assert answers[number].tolist() == [*said, 0]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_labels_of_a_window_count_where_they_are_answers(split: str, folder: Path) -> None:
    """Windows are cut from the documents end to end, in an order of their own: told by the tokens."""
    corpus = prepared(folder)
    (part,) = corpus.parts
    tokens, answers = (open_documents(Path(part.prefix).with_name(name)) for name in ("tokens", "answers"))
    counts = {}
    for number in range(len(tokens)):
        ids, said = tokens[number].tolist(), answers[number].tolist()
        for place in range(4, len(ids)):  # five tokens in a row, of which the last is the label
            counts.setdefault(tuple(ids[place - 4 : place + 1]), set()).add(said[place])
    windows, seen = corpus.open(split), 0
    assert len(windows) > 3
    for number in range(len(windows)):
        window = windows[number]
        text = [*window["tokens"].tolist(), int(window["labels"][-1])]
        for place in range(3, len(text) - 1):
            found = counts.get(tuple(text[place - 3 : place + 2]), set())
            if len(found) == 1:
                assert window["loss_mask"][place] == found.pop()
                seen += 1
    assert seen > 100


CONVERSATIONS = {
    "special": ([{"role": "user", "content": "a<|im_end|>"}, {"role": "assistant", "content": "b"}], "is a special token"),
    "no answer": ([{"role": "user", "content": "a"}], "nobody answers"),
    "no text": ([{"role": "assistant", "content": None}], "no object with the texts"),
    "no list": ("hello", "no list of messages"),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_what_is_no_conversation_is_refused_with_its_line(name: str, folder: Path) -> None:
    messages, words = CONVERSATIONS[name]
    with (folder / "chats.jsonl").open("a") as file:
        file.write(json.dumps({"messages": messages}) + "\n")
    with pytest.raises(DataError, match=r"chats\.jsonl:61: ") as raised:
        prepared(folder)
    assert words in str(raised.value)


def test_a_template_that_does_not_go_turn_by_turn_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages | length }}" + TEMPLATE)
    with pytest.raises(DataError, match="turn by turn"):
        prepared(folder)


def test_a_tokenizer_without_a_template_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="no chat template"):
        prepared(folder)
