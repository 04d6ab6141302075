from __future__ import annotations

from eellm.data import tokenizer_files
from eellm.data.text import documents
from eellm.data.tokenizer_files import prepare_tokenizer
from eellm.data.tokenizer_training import training_sample


def test_training_is_deterministic_and_cached_by_content(data_config, tokenizer_config, text_folder, monkeypatch, tmp_path):
    data = data_config(text_folder)
    first, path = prepare_tokenizer(data, tokenizer_config)
    elsewhere, other_path = prepare_tokenizer(data.model_copy(update={"cache_dir": str(tmp_path / "other")}), tokenizer_config)
    assert path != other_path
    assert path.name == other_path.name
    assert path.read_bytes() == other_path.read_bytes()
    assert first.vocab_size == elsewhere.vocab_size == 300

    def fail(*_: object) -> None:
        raise AssertionError("trained again")

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer_files, "train_byte_bpe", fail)
        again, same_path = prepare_tokenizer(data, tokenizer_config)
    assert same_path == path
    assert again.to_bytes() == first.to_bytes()
    smaller = tokenizer_config.model_copy(update={"vocab_size": 280})
    assert prepare_tokenizer(data, smaller)[1] != path
    (text_folder / "new.txt").write_text("more text")
    assert prepare_tokenizer(data, tokenizer_config)[1] != path


def test_training_sample_is_as_large_as_asked_and_spread(data_config, tmp_path):
    for number in range(200):
        (tmp_path / f"{number:03d}.txt").write_text(f"{number:03d} " + "x" * (100 if number % 2 else 900))
    data = data_config(tmp_path)
    assert list(training_sample(data, 1.0)) == [text for _, text in documents(data)]
    sample = list(training_sample(data, 0.02))
    numbers = [int(text[:3]) for text in sample]
    assert 0.019e6 <= sum(map(len, sample)) <= 0.022e6
    # a fifth of the text, so a fifth of each fifth of the documents
    for start in range(0, 200, 40):
        assert 4 <= len([number for number in numbers if start <= number < start + 40]) <= 20
