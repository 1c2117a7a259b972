"""What a person finds in the lab's pages, asked of a real server over HTTP."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

import db.notebook
from db.notebook.canned import QUERIES
from db.store import Store

if TYPE_CHECKING:
    from tests.notebook.conftest import Sample, Serve

TABLES = json.loads((Path(db.notebook.__file__).parent / "metadata.json").read_text())["databases"]["lab"]["tables"]
OURS = ("/", "/lab", *(f"/lab/experiments/{key}" for key in range(1, 8)), "/lab/runs/1", "/lab/runs/13", "/lab/runs/14")
PAGES = (
    *OURS,
    *(f"/lab/{table}" for table, about in TABLES.items() if not about.get("hidden")),
    *(f"/lab/{name}?run_id=1" if name == "run-curve" else f"/lab/{name}" for name in QUERIES),
)


def test_front_page_says_what_the_lab_knows_and_what_runs(browse: httpx.Client) -> None:
    page = browse.get("/")
    text = _text(page)
    assert "7 experiments" in text
    assert "3 concluded" in text
    assert "12 runs done" in text
    assert "One expert a token top_k 1 improved −0.0412 val_bpb 3" in text
    assert "A ten times smaller learning rate lr 0.0003 worse +0.1904 val_bpb 3" in text
    assert "Half the load-balancing weight load_balance_weight 0.005 equivalent +0.0011 val_bpb 3" in text
    assert "Eight narrower experts treatment, seed 1 25 / 40" in text
    assert "Fewer experts a token helps at this budget." in text
    assert "$0.01 today" in text
    assert "Preset micro on cpu-x86_64" in text
    assert "−0.0389 val_bpb to expect in all" in page.text


def test_experiment_page_holds_the_whole_of_it(browse: httpx.Client, sample: Sample) -> None:
    page = browse.get("/lab/experiments/1")
    text = _text(page)
    assert sample.sentence in text
    assert "−0.0412 val_bpb, 95 % interval −0.0562 to −0.0262; lower is better" in text
    assert "top_k 2 1" in text  # only the knob that changes
    assert "num_experts" not in text.split("The stored row")[0]
    assert "approve 7.6 of 10 by rubric" in text
    assert "seed 0 baseline 2.6200 treatment 2.5788 difference −0.0412" in text
    assert "seed 2 baseline 2.6320 treatment 2.5826 difference −0.0494" in text
    assert page.text.count('class="curves"') == 6  # train_loss and val_bpb, three seeds
    assert page.text.count('class="line baseline"') == 6
    assert "run 1 (train, seed 0) completed, val_bpb 2.6200" in text


def test_pages_say_over_how_much_text_a_curve_is(browse: httpx.Client) -> None:
    said = "val_bpb along the curve: 8,192 tokens of val; the score: 65,536 tokens of val"
    assert said in browse.get("/lab/runs/1").text
    assert said in browse.get("/lab/experiments/1").text


def test_run_page_shows_the_tables_of_a_score(browse: httpx.Client) -> None:
    text = _text(browse.get("/lab/runs/1"))
    assert "bpb_by_topic bpb bytes Arts 2.5 1044 History 2.25 812" in text
    assert "layers layer load router_margin 0 [3, 5] 0.125" in text


def test_experiment_page_without_a_verdict_says_why(browse: httpx.Client) -> None:
    assert "None yet: the runs below are not done." in _text(browse.get("/lab/experiments/5"))
    unrun = _text(browse.get("/lab/experiments/7"))
    assert "None yet: nothing has been run." in unrun
    assert "Not reviewed yet." in unrun


def test_failed_run_shows_its_error_and_the_end_of_its_log(browse: httpx.Client) -> None:
    text = _text(browse.get("/lab/runs/13"))
    assert "out_of_memory: 3.1 GiB more is needed" in text
    assert "torch.OutOfMemoryError" in text
    assert "torch.OutOfMemoryError" in _text(browse.get("/lab/failures-with-logs"))


@pytest.mark.parametrize("page", PAGES)
def test_every_page_answers_and_escapes_what_experiments_say(browse: httpx.Client, page: str) -> None:
    answer = browse.get(page)
    assert answer.status_code == 200
    assert "<script>alert(" not in answer.text
    loaded = re.findall(r"""<(?:script|link|img)[^>]*(?:src|href)=["']?(?:https?:|//)[^>]*""", answer.text)
    assert [place for place in loaded if "application/json" not in place] == []  # works offline


def test_hostile_text_is_shown_as_text(browse: httpx.Client, sample: Sample) -> None:
    assert sample.hostile in _text(browse.get("/lab/experiments/4"))


def test_metadata_describes_every_table_and_column_of_the_schema(sample: Sample) -> None:
    store = sample.lab.store
    schema = {
        row["name"]: {column["name"] for column in store.rows(f"PRAGMA table_xinfo({row['name']})")}
        for row in store.rows("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE '%fts%'")
        if not TABLES.get(row["name"], {}).get("hidden")
    }
    described = {name: set(about["columns"]) for name, about in TABLES.items() if "columns" in about}
    assert described == schema
    views = {row["name"] for row in store.rows("SELECT name FROM sqlite_master WHERE type = 'view'")}
    assert views <= TABLES.keys()


def test_tables_show_titles_facets_and_no_search_internals(browse: httpx.Client) -> None:
    assert '<a href="/lab/experiments/1">One expert a token</a>' in browse.get("/lab/verdicts").text
    facets = browse.get("/lab/experiments.json").json()["facet_results"]
    assert set(facets) == {"status", "domain", "proposer"}
    assert "experiments_fts" not in browse.get("/lab").text
    found = browse.get("/lab/experiments.json?_search=narrower&_shape=array").json()
    assert [row["title"] for row in found] == ["Eight narrower experts"]


def test_canned_queries_answer_with_the_stored_values(browse: httpx.Client) -> None:
    verdicts = browse.get("/lab/verdict-table.json?_shape=array").json()
    assert [(row["experiment_id"], row["verdict"], row["effect"]) for row in verdicts] == [
        (1, "improved", -0.0412),
        (2, "worse", 0.1904),
        (3, "equivalent", 0.0011),
    ]
    assert [row["step"] for row in browse.get("/lab/running-now.json?_shape=array").json()] == [25]
    curve = browse.get("/lab/run-curve.json?run_id=1&_shape=array").json()
    assert [row["step"] for row in curve if row["metric"] == "val_bpb"] == [8, 16, 24, 32, 40]
    costs = browse.get("/lab/cost-per-experiment.json?_shape=array").json()
    assert {row["experiment_id"]: (row["runs"], row["usd"]) for row in costs}[5] == (2, 0.0123)
    cited = browse.get("/lab/insights-with-verdicts.json?_shape=array").json()
    assert [(row["knob"], row["experiment_id"]) for row in cited] == [("top_k", 1)]
    money = browse.get("/lab/money-per-day.json?_shape=array").json()
    assert [(row["model"], row["calls"], row["answered"], row["usd"]) for row in money] == [("a/model", 1, 1, 0.0123)]


def test_pages_follow_a_runner_that_writes(browse: httpx.Client, sample: Sample) -> None:
    stop = threading.Event()
    written: list[int] = []

    def write() -> None:
        while not stop.is_set():
            step = 26 + len(written) % 10
            sample.advance(step)
            written.append(step)

        sample.advance(37)
        sample.lab.close()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        statuses = [browse.get(page).status_code for page in ("/", "/lab/experiments/5", "/lab/runs/14", "/lab") * 3]
    finally:
        stop.set()
        writer.join()
        shown = _text(browse.get("/"))
        sample.advance(25)  # as the other tests expect it

    assert statuses == [200] * 12
    assert len(written) > 3
    assert "37 / 40" in shown


def test_nothing_can_be_changed(browse: httpx.Client, sample: Sample) -> None:
    for statement in ("DELETE FROM runs", "ATTACH DATABASE '/tmp/other.db' AS other", "PRAGMA query_only = 0"):
        answer = browse.get("/lab.json", params={"sql": statement})
        assert answer.status_code == 400, statement

    assert browse.get("/lab.db").status_code in (403, 404)
    assert sample.lab.store.value("SELECT count(*) FROM runs") == 15


def test_only_the_database_is_served(browse: httpx.Client, sample: Sample) -> None:
    secret = "sk-or-v1-not-for-anyone"
    path = sample.lab.folder / ".env"
    path.write_text(f"OPENROUTER_API_KEY={secret}\n")
    path.chmod(0o600)
    for place in ("/.env", "/lab/.env", "/notebook/../.env", "/notebook/..%2F.env", "/notebook//etc/passwd"):
        answer = browse.get(place, follow_redirects=True)
        assert secret not in answer.text
        assert answer.status_code in (403, 404), place


def test_unknown_rows_are_not_found(browse: httpx.Client) -> None:
    for page in ("/lab/experiments/999", "/lab/runs/999", "/lab/experiments/one", "/lab/nothing"):
        answer = browse.get(page)
        assert answer.status_code == 404, page
        assert "Blueberry" in answer.text


def test_another_name_for_this_machine_is_refused(browse: httpx.Client) -> None:
    assert browse.get("/", headers={"host": "rebound.example:8001"}).status_code == 403
    for name in ("127.0.0.1:8001", "localhost", "[::1]:8001"):
        assert browse.get("/", headers={"host": name}).status_code == 200


def test_an_empty_lab_says_what_to_do(tmp_path: Path, serve: Serve) -> None:
    Store(tmp_path / "lab.db").close()
    with serve(tmp_path) as url:
        text = _text(httpx.get(url, timeout=30))

    assert "No verdict yet." in text
    assert "blueberry suggest asks for new ones." in text
    assert "No runner has worked here yet; blueberry run starts one." in text


def _text(page: httpx.Response) -> str:
    assert page.status_code == 200
    words = re.sub(r"<svg.*?</svg>|<[^>]+>", " ", page.text.partition("<body")[2], flags=re.S)
    for code, sign in (("&lt;", "<"), ("&gt;", ">"), ("&#39;", "'"), ("&#34;", '"'), ("&amp;", "&")):
        words = words.replace(code, sign)

    return " ".join(words.split()).replace(" ,", ",").replace(" ;", ";")
