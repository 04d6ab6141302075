"""Tasks over local files, one of every kind of request, about Python source, which the model that comes with eellm knows."""

from __future__ import annotations

import json
from pathlib import Path

QUESTIONS = [
    ("import os\nimport ", ["sys", "banana", "(((", "weather"]),
    ("class Thing(object):\n    def __init__(", ["self", "chair", "==", "river"]),
    ("for name in ", ["names", "))", "is", "+ +"]),
    ("    if value is not ", ["None", "blue", "import", "}}"]),
    ("try:\n    pass\nexcept ", ["ValueError", "tomorrow", "[0]", "elif"]),
    ("    return ", ["True", "))))", "class", "orange"]),
    ("def main():\n    ", ["print", "======", "else", "???"]),
    ("import unit", ["test", "blue", ")))", "from"]),
]
TEXTS = ["def main(argv):\n    return 0\n", "import os\nimport sys\n\nclass A:\n    pass\n", "x"]

_KINDS = {
    "py_choice": """output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]""",
    "py_next": """output_type: loglikelihood
doc_to_text: "{{text}}"
doc_to_target: "{{choices[0]}}"
target_delimiter: ""
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}""",
    "py_text": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]""",
    "py_write": """output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]""",
}
"""Task -> its YAML, without the data."""

NAMES = list(_KINDS)
GROUP = "py_scored"


def write_tasks(folder: Path) -> Path:
    """Fill a folder with the tasks, and a group of two of them; returns it."""
    folder.mkdir(parents=True)
    questions, texts = folder / "questions.jsonl", folder / "texts.jsonl"
    questions.write_text("".join(json.dumps({"text": text, "choices": choices}) + "\n" for text, choices in QUESTIONS))
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for name, kind in _KINDS.items():
        data = texts if name == "py_text" else questions
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
            f"test_split: test\nfewshot_split: test\nmetadata: {{version: 1.0}}\n{kind}\n"
        )
    (folder / f"{GROUP}.yaml").write_text(
        f"group: {GROUP}\ntask: [py_choice, py_next]\n"
        "aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]\nmetadata: {version: 1.0}\n"
    )
    return folder
