"""lm-evaluation-harness on the same model and items: its own Hugging Face model, our adapter, and our own tasks.

Three programs score one checkpoint: transformers under the harness, the engine under the harness, and the engine under
`hybridlm.evals`. With HYBRIDLM_DATA set the items are the first 100 of the real files, else made ones.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.cli.micro import write_micro
from tests.data.helpers import text
from tests.evals import bench_items

from hybridlm.data import Document
from hybridlm.engine import Engine
from hybridlm.evals import bits_per_byte, open_task
from hybridlm.evals.items import find, read_items
from hybridlm.evals.run import run
from hybridlm.formats.convert import convert

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed; pip install hybridlm[evals]")
pytest.importorskip("accelerate", reason="the harness' own Hugging Face model needs accelerate")
pytestmark = pytest.mark.slow  # about a minute: the harness takes 8 s to start, and starts three times

MULTIPLE = "output_type: multiple_choice\nmetric_list:\n  - metric: acc\n  - metric: acc_bytes\n"
YAML = {
    "arc_easy": ("arc_easy_test", MULTIPLE + 'doc_to_text: "Question: {{question}}\\nAnswer:"\n'
                 "doc_to_choice: choices\ndoc_to_target: answer\n"),
    "hellaswag": ("hellaswag_val", MULTIPLE + 'doc_to_text: "{{context}}"\ndoc_to_choice: choices\n'
                                              "doc_to_target: answer\n"),
    "boolq": ("boolq_val", MULTIPLE + "doc_to_text: \"{{context}}\\nQuestion: {{question.rstrip('?')}}?\\nAnswer:\"\n"
                                      "doc_to_choice: choices\ndoc_to_target: answer\n"),
    "winogrande": ("winogrande_val", MULTIPLE.replace("  - metric: acc_bytes\n", "") +
                   "doc_to_text: answer\ndoc_to_target: \"{{question.split('_')[1].strip()}}\"\n"
                   "doc_to_choice: \"{{[question.split('_')[0] + choices[0], "
                   "question.split('_')[0] + choices[1]]}}\"\n"),
    "mmlu": ("mmlu_test", MULTIPLE + 'doc_to_text: "{{question.strip()}}\\nA. {{choices[0]}}\\nB. {{choices[1]}}\\n'
             'C. {{choices[2]}}\\nD. {{choices[3]}}\\nAnswer:"\ndoc_to_choice: ["A", "B", "C", "D"]\n'
             "doc_to_target: answer\nfewshot_split: dev\nfewshot_config:\n  sampler: first_n\nnum_fewshot: 5\n"
             'description: "The following are multiple choice questions (with answers) about SUBJECT.\\n\\n"\n'),
    "lambada": ("lambada_openai_test", "output_type: loglikelihood\nmetric_list:\n  - metric: acc\n"
                '  - metric: perplexity\ndoc_to_text: "{{context}}"\ndoc_to_target: "{{\' \' + target}}"\n'),
    "rolling": ("documents", 'output_type: loglikelihood_rolling\nmetric_list:\n  - metric: bits_per_byte\n'
                'doc_to_text: ""\ndoc_to_target: "{{text}}"\n'),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint, its GGUF in float32, item files for both programs, and the harness's task files."""
    root = tmp_path_factory.mktemp("harness")
    write_micro(root / "model", chat="", max_position_embeddings=8192)
    convert(root / "model", root / "model.gguf", "f32")
    real = os.environ.get("HYBRIDLM_DATA")
    for name, (file, yaml) in YAML.items():
        if name == "rolling":
            made = [{"text": text(i, 40 + 30 * i)} for i in range(8)]
        else:
            made = rows_of(file, 100, real)
        subject = made[0].get("subject") or ""
        if name == "mmlu":
            made = [row for row in made if row["subject"] == subject]
            dev = [row for row in rows_of("mmlu_dev", 285, real) if row["subject"] == subject]
            write(root, "mmlu_dev", dev)
        write(root, file, made)
        splits = f"    test: {root / file}.jsonl\n"
        if name == "mmlu":
            splits += f"    dev: {root / 'mmlu_dev'}.jsonl\n"
        yaml = yaml.replace("SUBJECT", subject.replace("_", " "))
        (root / "tasks").mkdir(exist_ok=True)
        (root / "tasks" / f"{name}.yaml").write_text(f"task: ours_{name}\ndataset_path: json\ndataset_kwargs:\n"
                                                     f"  data_files:\n{splits}test_split: test\n{yaml}")
    return root


def rows_of(file, count, real):
    if not real:
        return bench_items.rows(file, 40)
    read = read_items(find(Path(real), file), choices="lambada" not in file)[:count]
    return [{"id": i.id, "question": i.question, "context": i.context, "choices": list(i.choices), "answer": i.answer,
             "target": i.target, "subject": i.subject} for i in read]


def write(root, file, made):
    (root / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")


def harness(root, program, model, arguments):
    """Task -> (figures, log-likelihoods of each document in order) by the harness's command line."""
    out = root / f"out-{model}-{'torch' if 'torch' in arguments else ''}"
    command = [sys.executable, "-m", program, "--model", model, "--model_args", arguments, "--tasks",
               ",".join(f"ours_{name}" for name in YAML), "--include_path", str(root / "tasks"), "--output_path",
               str(out), "--log_samples", "--device", "cpu", "--batch_size", "8"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(root / "home"),
                   "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = out.rglob("results_*.json")
    figures = json.loads(results.read_text())["results"]
    found = {}
    for name in YAML:
        (samples,) = out.rglob(f"samples_ours_{name}_*.jsonl")
        documents = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda d: d["doc_id"])
        values = [[float(x) for x in np.ravel([r[0] if isinstance(r, list) else r for r in _flat(d["resps"])])]
                  for d in documents]
        found[name] = ({k.split(",")[0]: v for k, v in figures[f"ours_{name}"].items()}, values)
    return found


def _flat(responses):
    """[[[ll, greedy]], ...] -> [[ll, greedy], ...]; a rolling one has no greedy."""
    return [r[0] if isinstance(r, list) else r for r in responses]


@pytest.fixture(scope="module")
def reference(place):
    return harness(place, "lm_eval", "hf", f"pretrained={place / 'model'},dtype=float32")


def close(found, wanted):
    for mine, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4)


@pytest.mark.parametrize("arguments", ["path={root}/model.gguf,exact=True,kv_type=f32,threads=1",
                                       "path={root}/model,backend=torch"])
def test_the_adapter_equals_the_harness_own_model(place, reference, arguments):
    found = harness(place, "hybridlm.evals.lm_eval", "hybridlm", arguments.format(root=place))
    for name, (figures, values) in reference.items():
        close(found[name][1], values)
        for metric in ("acc", "acc_bytes"):
            assert found[name][0].get(metric) == figures.get(metric), name
        for metric in ("perplexity", "bits_per_byte"):
            if metric in figures:
                assert found[name][0][metric] == pytest.approx(figures[metric], rel=1e-4), name


def test_our_own_tasks_equal_the_harness(place, reference):
    with Engine.open(place / "model.gguf", exact=True, kv_type="f32", threads=1) as engine:
        for name, (figures, values) in reference.items():
            if name == "rolling":
                texts = [json.loads(line)["text"] for line in (place / "documents.jsonl").open()]
                found = bits_per_byte(engine, engine.tokenizer, [Document(t) for t in texts])
                assert found.bits_per_byte == pytest.approx(figures["bits_per_byte"], rel=1e-4)
                continue
            result = run(open_task.plan(name, place, engine.tokenizer, engine.context), engine, model={})
            close([r["logprobs"] for r in result.records], values)
            assert result.figures["acc"]["value"] == pytest.approx(figures["acc"], abs=1e-12), name
            assert result.figures["acc"]["stderr"] == pytest.approx(figures["acc_stderr"], rel=1e-6), name
            if "acc_bytes" in figures:
                assert result.figures["acc_bytes"]["value"] == pytest.approx(figures["acc_bytes"], abs=1e-12), name
            if name == "lambada":
                assert result.figures["perplexity"]["value"] == pytest.approx(figures["perplexity"], rel=1e-4)
                assert math.isfinite(figures["perplexity"])


def test_greedy_text_through_the_harness(place):
    """What `generate_until` writes, against transformers."""
    yaml = ('task: ours_writing\ndataset_path: json\ndataset_kwargs:\n  data_files:\n'
            f'    test: {place / "hellaswag_val"}.jsonl\ntest_split: test\noutput_type: generate_until\n'
            'doc_to_text: "{{context}}"\ndoc_to_target: "x"\ngeneration_kwargs:\n  until: ["zz"]\n  max_gen_toks: 8\n'
            '  do_sample: false\nmetric_list:\n  - metric: exact_match\n')
    (place / "writing").mkdir(exist_ok=True)
    (place / "writing" / "w.yaml").write_text(yaml)
    texts = []
    for program, model, arguments in (("lm_eval", "hf", f"pretrained={place / 'model'},dtype=float32"),
                                      ("hybridlm.evals.lm_eval", "hybridlm",
                                       f"path={place / 'model.gguf'},exact=True,kv_type=f32,threads=1")):
        out = place / f"writing-{model}"
        done = subprocess.run([sys.executable, "-m", program, "--model", model, "--model_args", arguments, "--tasks",
                               "ours_writing", "--include_path", str(place / "writing"), "--output_path", str(out),
                               "--log_samples", "--device", "cpu", "--limit", "8"], capture_output=True, text=True,
                              env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "home")}, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        (samples,) = out.rglob("samples_*.jsonl")
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        texts.append([re.sub(r"<\|\w+\|>", "", d["resps"][0][0])  # special tokens, which transformers leaves out
                      for d in sorted(lines, key=lambda d: d["doc_id"])])
    assert texts[0] == texts[1]
    assert any(texts[0])
