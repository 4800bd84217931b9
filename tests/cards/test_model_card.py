"""Cards: one rendering of one record, by the trainer, by `trl-mprm card`, and for the kept cards of the demo."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from helpers import PUSH, CommitHub, ReadHub, hub_on_this_machine, make_rows, nf4
from huggingface_hub import ModelCard
from peft import LoraConfig

from trl_mprm import ProcessRewardConfig, ProcessRewardModel, ProcessRewardTrainer, select
from trl_mprm.cards.model_card import (
    PUBLISHED_BENCHMARKS,
    add_eval_results,
    benchmark_facts,
    read_record,
    render_card,
)
from trl_mprm.cli import main
from trl_mprm.evaluation.benchmarks import BENCHMARKS
from trl_mprm.evaluation.metrics import step_metrics
from trl_mprm.serving.export import check_exportable


KEPT = Path(__file__).parents[2] / "model_cards"
METRICS = step_metrics([[1, -1], [1, 1, -1], [-1]], [[0.9, 0.2], [0.8, 0.6, 0.4], [0.7]], threshold=0.5)


def trained(model: str, folder: Path, **config) -> ProcessRewardTrainer:
    rows = Dataset.from_list([row | {"mc_scores": row["labels"]} for row in make_rows(images=False)])
    kept = select(rows, "random", fraction=0.5, seed=3)
    config = {"report_to": "none"} | config
    args = ProcessRewardConfig(str(folder), use_cpu=True, max_steps=1, save_strategy="no", **config)
    trainer = ProcessRewardTrainer(model, args, train_dataset=rows.select(kept.indices), selection=kept.report)
    trainer.train()
    trainer.save_model()
    return trainer


@pytest.fixture(scope="module")
def folder(tiny_folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cards") / "someone" / "tiny-mprm"
    trainer = trained(tiny_folders["qwen2"], folder)
    trainer.create_model_card(dataset_name="org/rollouts", license="mit", results=METRICS, benchmark="toy")
    return folder


def test_card_is_the_rendering_of_its_record(folder, capsys):
    card, record = (folder / "README.md").read_text(), read_record(folder)
    for said in (
        "license: mit", "datasets: org/rollouts", "- trl", "- mprm", "- process-reward-model",
        "rule `random`, fraction 0.5, ties `hash`, seed 3, per source. Revision of the subset: `",
        "| a | 4 | 0 | 4 | 2 |", "| optimizer steps | 1 |", 'from_pretrained("tiny-mprm")', "threshold `fixed`",
        "macro-F1, step-weighted mean over sources (the paper's micro-F1) | ", "macro-F1, pooled", "macro-F1, plain mean",
        "## Limits", "@article{li2026training",
    ):  # fmt: skip
        assert said in card, said
    all_wrong, kept = record["selection"]["all_wrong"], record["selection"]["kept"]
    said = f"{all_wrong} of the {kept} kept rollouts ({100 * all_wrong / kept:.1f}%) have no positive step."
    assert kept == 4 and all_wrong and said in card
    entries = {entry.metric_type: entry.metric_value for entry in ModelCard(card).data.eval_results}
    assert entries["macro_f1_pooled"] == round(METRICS["macro_f1_pooled"], 4)
    assert record["selection"]["revision"] in card
    assert str(folder.parent) not in card + json.dumps(record) and os.environ["HOME"] not in card + json.dumps(record)

    assert main(["card", str(folder)]) == 0
    assert (folder / "README.md").read_text() == card and "publish: hf upload ORG/NAME" in capsys.readouterr().out
    other = folder.parent / "other.md"
    assert main(["card", str(folder / "model_card.json"), "--license", "apache-2.0", "--repo", "you/prm",
                 "--output", str(other)]) == 0  # fmt: skip
    assert 'from_pretrained("you/prm")' in other.read_text() and "license: apache-2.0" in other.read_text()
    assert (folder / "README.md").read_text() == card


def test_card_shows_what_the_selection_changed(folder):
    """The figures of the report, before and after, for all sources and for each."""
    card, selection = (folder / "README.md").read_text(), read_record(folder)["selection"]
    (all_mixed, kept_mixed), valid = selection["mixed_share"], selection["valid"]
    assert f"| rollouts | {valid} | 4 |" in card and valid == 8
    assert f"| mixed rollouts (good and bad steps) | {100 * all_mixed:.1f}% | {100 * kept_mixed:.1f}% |" in card
    assert "| mean Monte Carlo score per step | {:.3f} | {:.3f} |".format(*selection["mean_mc"]) in card
    before, after = selection["sources"]["a"]["mixed_share"]
    assert f"| a | 4 | 0 | 4 | 2 | {100 * before:.1f}% | {100 * after:.1f}% | " in card


def test_card_says_what_was_not_tested(folder):
    card, record = (folder / "README.md").read_text(), read_record(folder)
    assert "- VisualProcessBench, ProcessBench and PRMBench as published.\n- Choosing among candidates" in card
    record["benchmarks"] = {
        "ProcessBench": benchmark_facts(METRICS, "Qwen/ProcessBench"),
        "ours": {"dataset_id": None, "n_questions": 3, "accuracy_mean": 0.5, "intervals": {}},
    }
    card = str(render_card(record))
    assert "- VisualProcessBench and PRMBench as published.\n- Reinforcement learning" in card
    published = {entry.hub_id: entry.title for entry in BENCHMARKS.values() if entry.hub_id}
    assert PUBLISHED_BENCHMARKS == published


def test_front_matter_names_base_data_by_commit_and_emissions(folder):
    record = read_record(folder)
    data = render_card(record).data
    assert (data.pipeline_tag, data.license, data.base_model, data.datasets) == (
        "text-classification", "mit", None, "org/rollouts",
    )  # fmt: skip
    assert record["training"]["emissions"] is None  # nothing measured them
    assert "co2" not in str(data) and "dataset_revisions" not in str(data) and "CO2" not in str(render_card(record))
    record |= {"base_model": "org/base", "base_model_on_hub": True, "images": True}
    record["dataset"]["revision"] = "a" * 40
    record["selection"]["input_revisions"] = {"org/all-rollouts": "b" * 40}
    record["training"] |= {"lora": {"r": 4, "alpha": 8}, "emissions": {
        "emissions": 0.0123, "energy_consumed": 0.05, "duration": 61.0, "country_name": "Norway",
        "codecarbon_version": "3.3.2"}}  # fmt: skip
    card = ModelCard(str(render_card(record)))
    assert (card.data.pipeline_tag, card.data.base_model) == ("image-text-to-text", "org/base")
    assert card.data.base_model_relation == "adapter" and card.data.library_name == "peft"
    assert card.data.datasets == ["org/rollouts", "org/all-rollouts"]
    assert card.data.dataset_revisions == {"org/rollouts": "a" * 40, "org/all-rollouts": "b" * 40}
    assert (
        card.data.co2_eq_emissions["emissions"] == 12.3 and card.data.co2_eq_emissions["source"] == "codecarbon 3.3.2"
    )
    assert (
        "| emissions, measured by codecarbon 3.3.2 | 12.3 g of CO2 equivalent, 0.05 kWh in 61 seconds |" in card.text
    )


def test_emissions_are_those_that_codecarbon_measured(tiny_folders, tmp_path):
    pytest.importorskip("codecarbon")
    trainer = trained(tiny_folders["qwen2"], tmp_path / "out", report_to="codecarbon")
    measured = read_record(tmp_path / "out")["training"]["emissions"]
    assert measured["duration"] > 0 and measured["energy_consumed"] > 0
    assert f"{1000 * measured['emissions']:.3g} g of CO2 equivalent" in (tmp_path / "out" / "README.md").read_text()
    assert trainer.args.report_to == ["codecarbon"]


def test_the_commands_of_a_card(folder, tmp_path, monkeypatch):
    """The export that it shows is a folder for vLLM; the Dockerfile is that of recipes/space."""
    card = (folder / "README.md").read_text()
    commands = re.findall(r"^trl-mprm .*", card.replace("  #", "\n#"), flags=re.MULTILINE)
    assert commands[:2] == ["trl-mprm serve tiny-mprm --ui", "trl-mprm export tiny-mprm exported"]
    shutil.copytree(folder, tmp_path / "tiny-mprm")
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(commands[1])[1:]) == 0
    assert (tmp_path / "exported" / "check.py").is_file() and (tmp_path / "exported" / "SERVE.md").is_file()
    ours = card.split("```dockerfile\n")[1].split("```")[0].replace("MODEL=tiny-mprm", "MODEL=you/your-mprm")
    recipe = (KEPT.parent / "recipes" / "space" / "Dockerfile").read_text().splitlines()
    assert ours.splitlines() == [line for line in recipe if not line.startswith("#")]


@pytest.mark.parametrize("architecture", ["llama", "internvl", "idefics3"])
def test_card_shows_vllm_where_the_export_takes_the_model(architecture, tiny_folders, tmp_path):
    trained(tiny_folders[architecture], tmp_path / "out")
    prm = ProcessRewardModel.from_pretrained(tmp_path / "out")
    try:
        check_exportable(prm)
        taken = True
    except ValueError:
        taken = False
    assert taken == ("trl-mprm export" in (tmp_path / "out" / "README.md").read_text()) == (architecture == "llama")


def test_results_go_into_the_record_and_edited_text_stays(folder):
    card = (folder / "README.md").read_text()
    path = add_eval_results(folder, "toy2", "second toy", None, METRICS)
    assert read_record(folder)["benchmarks"]["second toy"] == json.loads(json.dumps(benchmark_facts(METRICS)))
    assert path.read_text() == str(render_card(read_record(folder)))
    assert "second toy: 3 solutions" in path.read_text() and "toy: 3 solutions" in card
    path.write_text(path.read_text() + "\nBy hand.\n")
    add_eval_results(folder, "toy3", "third toy", None, METRICS)
    assert "By hand." in path.read_text() and "third toy: 3 solutions" not in path.read_text()
    assert {entry.dataset_name for entry in ModelCard.load(path).data.eval_results} == {
        "toy", "second toy", "third toy",
    }  # fmt: skip


def test_an_adapter_of_a_local_base_is_not_ready_to_publish(folder, tmp_path, capsys):
    copy = tmp_path / "adapter"
    shutil.copytree(folder, copy)
    (copy / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/srv/someone/base"}))
    assert main(["card", str(copy)]) == 0
    said = capsys.readouterr().out
    assert "names the base /srv/someone/base, a folder of this machine" in said and "hf upload" not in said
    (copy / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    assert main(["card", str(copy)]) == 0
    assert "publish: hf upload" in capsys.readouterr().out


def test_wrong_records_are_one_line(tmp_path, capsys):
    assert main(["card", str(tmp_path)]) == 2
    assert "no such file; expected the record that ProcessRewardTrainer writes" in capsys.readouterr().err
    (tmp_path / "model_card.json").write_text("{}")
    assert main(["card", str(tmp_path)]) == 2
    assert "not the record of a model card" in capsys.readouterr().err


def test_offline_everything_is_written_and_told_how_to_push(tiny_folders, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    trainer = trained(tiny_folders["qwen2"], tmp_path / "out", push_to_hub=True, hub_model_id="someone/tiny-mprm")
    assert "training goes on, and everything is written locally" in caplog.text
    assert trainer.push_to_hub(license="mit") is None
    assert f"hf upload someone/tiny-mprm {tmp_path / 'out'} ." in caplog.text
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "model.safetensors").is_file()


TRAIN = """
import sys
from trl_mprm.cli import main
sys.exit(main(["train", "--dataset_name", "org/rollouts", "--model_name_or_path", sys.argv[1], "--output_dir",
               sys.argv[2], "--max_steps", "1", "--use_cpu", "--report_to", "none", "--dtype", "float32"]))
"""


@pytest.mark.slow
def test_model_names_its_subset_by_commit(corpus, tiny_folders, tmp_path):  # noqa: F811
    """Select and publish, train on what was published: the card has the rule, the revision and the commit."""
    published = type("OneHub", (CommitHub,), {"commits": [], "lfs": {}})
    with hub_on_this_machine(published, tmp_path / "home") as env:
        argv = [sys.executable, "-c", PUSH, corpus, tmp_path / "kept.jsonl"]
        subprocess.run(argv, env=env | {"HF_TOKEN": "hf_" + "secret" * 5}, check=True, timeout=120)
    hub = type("SameHub", (ReadHub,), {"files": published.commits[0]})
    with hub_on_this_machine(hub, tmp_path / "home2") as env:
        argv = [sys.executable, "-c", TRAIN, tiny_folders["qwen2_5_vl"], tmp_path / "out"]
        done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    card, selection = (tmp_path / "out" / "README.md").read_text(), json.loads(published.commits[0]["selection.json"])
    assert f"From [org/rollouts](https://huggingface.co/datasets/org/rollouts), revision `{hub.sha}`." in card
    assert f"seed 4, per source. Revision of the subset: `{selection['revision']}`." in card
    assert "| GEOS | 7 | 1 | 6 | 3 |" in card


class BothHubs(CommitHub, ReadHub):
    """Read `org/rollouts`, write `someone/kept-rollouts`."""

    def do_GET(self):
        (ReadHub if "org/rollouts" in self.path else CommitHub).do_GET(self)

    def do_POST(self):
        (ReadHub if "/paths-info/" in self.path else CommitHub).do_POST(self)


def test_card_of_a_subset_names_its_source_by_commit_with_its_licence(tmp_path):
    row = {"question": "1 + 1?", "steps_with_score": [{"step": "2", "score": 0.5, "num_mc_total": 16}]}
    files = {"README.md": b"# rollouts", "train.jsonl": "".join(json.dumps(row) + "\n" for _ in range(4)).encode()}
    hub = type("OneHub", (BothHubs,), {"commits": [], "lfs": {}, "files": files})
    with hub_on_this_machine(hub, tmp_path / "home") as env:
        argv = [sys.executable, "-c", PUSH, "org/rollouts", tmp_path / "kept.jsonl"]
        done = subprocess.run(argv, env=env | {"HF_TOKEN": "hf_x"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (published,) = hub.commits
    card, selection = ModelCard(published["README.md"].decode()), json.loads(published["selection.json"])
    assert card.data.license == "mit" and selection["input_revisions"] == {"org/rollouts": hub.sha}
    assert f"of [org/rollouts](https://huggingface.co/datasets/org/rollouts) (commit {hub.sha})." in card.text
    assert f"| revision of the subset | `{selection['revision']}`, XXH3-128 of the kept lines |" in card.text


@pytest.mark.parametrize("record", sorted(KEPT.glob("*.json")), ids=lambda path: path.stem)
def test_kept_cards_are_renderings_of_their_records(record):
    assert record.with_suffix(".md").read_text() == str(render_card(read_record(record)))


def test_a_name_of_a_source_cannot_break_the_table_of_a_card():
    record = read_record(KEPT / "miniature-mprm-bis10.json")
    source = record["selection"]["sources"]["sum"]
    record["selection"]["sources"] = {"a\\|b\r\n\n# c": source}
    assert f"\n| a&#92;&#124;b # c | {source['read']} |" in str(render_card(record))


def test_the_tables_of_a_card_are_whole():
    card = (KEPT / "miniature-mprm-bis10.md").read_text()
    table = card[card.index("| what the selection changes") :].split("\n\n")[0]
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [
        "| rollouts", "| mixed rollouts (good and bad steps)", "| steps in error (Monte Carlo score 0)",
        "| mean Monte Carlo score per step",
    ]  # fmt: skip


def test_every_kept_card_has_a_record():
    names = {path.stem for path in KEPT.glob("*.md")} - {"README"}
    assert names == {path.stem for path in KEPT.glob("*.json")} and len(names) == 3


def run_snippet(card: Path) -> str:
    """What the example of a card prints, in a process of its own beside the model's folder."""
    code = card.read_text().split("```python\n")[1].split("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=card.parents[1], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{code}\n{done.stderr}"
    return done.stdout.splitlines()[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qlora", "bfloat16"])
def test_the_example_of_a_card_gives_the_scores_of_the_model(kind, tiny_folders, tmp_path):
    """Its imports, double quantisation and dtype included, on a question of the model's own data."""
    folder = tmp_path / "tiny"
    qlora = {"quantization_config": nf4(), "peft_config": LoraConfig(r=4)} if kind == "qlora" else {}
    args = ProcessRewardConfig(
        str(folder), use_cpu=True, report_to="none", max_steps=2, save_strategy="no", learning_rate=1e-2,
        model_init_kwargs={"dtype": "bfloat16"} if kind == "bfloat16" else None, bf16=False,
    )  # fmt: skip
    rows = make_rows(images=True)
    trainer = ProcessRewardTrainer(tiny_folders["qwen2_5_vl"], args, train_dataset=Dataset.from_list(rows), **qlora)
    trainer.train()
    trainer.save_model()
    shortest = min(rows, key=lambda row: len(str((row["prompt"], row["completions"]))))
    for number, image in enumerate(shortest["images"]):
        name = "picture.png" if len(shortest["images"]) == 1 else f"picture-{number + 1}.png"
        image.save(tmp_path / name)
    prm = ProcessRewardModel(trainer.model, trainer.processing_class, trainer.step_format)
    scores = prm.score(shortest["images"], shortest["prompt"], shortest["completions"])
    assert run_snippet(folder / "README.md") == str([round(score, 4) for score in scores])


def test_names_cannot_break_a_card():
    record = read_record(KEPT / "miniature-mprm-bis10.json")
    bad = 'a`\n# b"); import os <img src=x> [c](javascript:d)'
    record |= {"name": bad, "base_model": bad, "dataset": record["dataset"] | {"name": bad, "example": {
        "images": 0, "question": bad, "steps": [bad]}}}  # fmt: skip
    record["benchmarks"] = {bad: next(iter(record["benchmarks"].values()))}
    body = str(render_card(record)).split("\n---\n", 1)[1]
    prose = re.sub(r"`[^`\n]*`", "", body.split("```python\n")[0] + body.split("```\n", 1)[1])  # without code spans
    assert '# a&#96; # b"); import os &lt;img src=x&gt; &#91;c&#93;(javascript:d)\n' in prose
    assert not re.search(r"^# b|\[c\]|<img", prose, flags=re.MULTILINE)
    compiled = ast.parse(body.split("```python\n")[1].split("```")[0])
    assert {node.value for node in ast.walk(compiled) if isinstance(node, ast.Constant)} >= {bad}
