"""What a workflow file may not be: each refusal names the line, the key and the remedy, and nothing runs."""

import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from agentctx.memory.errors import AgentctxError, ConfigError, InputError
from agentctx.workflows.definition.file import MOST_BYTES, read_source
from agentctx.workflows.definition.folder import open_definition

GOOD = """\
version: 1
name: small
nodes:
  cut: {type: split}
  note: {type: read}
  say: {type: answer}
edges:
  - {source: START, target: cut}
  - {source: cut, map: {over: cut, as: part, node: note}}
  - {source: note, target: say}
  - {source: say, target: END}
"""


def opened(folder: Path, text: str):
    path = folder / "flow.yaml"
    path.write_text(text)
    return open_definition(path)


def refused(folder: Path, text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        opened(folder, text)
    assert caught.value.hint, "an error says what to do"
    return caught.value


def test_the_small_file_is_right(tmp_path):
    assert opened(tmp_path, GOOD).name == "small"


@pytest.mark.parametrize(
    ("old", "new", "message", "hint"),
    [
        ("{type: answer}", "{typ: answer}", "flow.yaml:6: nodes.say.typ: this key is not known", "'type'"),
        ("version: 1", "version: 2", "flow.yaml:1: version: input should be 1, got 2", "schema"),
        ("name: small", "nmae: small", "flow.yaml:2: nmae: this key is not known", "'name'"),
        (
            "{type: split}",
            "{type: split, with: {chunk_token: 9}}",
            "flow.yaml:4: nodes.cut.with.chunk_token",
            "_t",
        ),
        (
            "{type: split}",
            "{type: split, with: {chunk_tokens: 9}}",
            "greater than or equal to 64, got 9",
            "raise",
        ),
        (
            "{type: read}",
            "{type: raed}",
            "flow.yaml:5: nodes.note.type: there is no node type 'raed'",
            "'read'",
        ),
        ("target: say}", "target: sya}", "flow.yaml:10: edges.2: there is no 'sya'", "'say'"),
        (
            "target: say}",
            "target: say, map: {over: a, node: b}}",
            "exactly one of target, targets, map",
            "schema",
        ),
        ("over: cut", "over: cuts", "flow.yaml:7: edges: there is no 'cuts'", "'cut'"),
        (
            "{type: answer}",
            "{type: answer, reads: nots}",
            "flow.yaml:6: nodes.say.reads: there is no 'nots'",
            "note",
        ),
        (
            "{type: answer}",
            "{type: answer, writes: said}",
            "flow.yaml:6: nodes.say.writes: there is no 'said'",
            "none",
        ),
        ("{type: answer}", "{type: answer, retry: {attempts: 9}}", "nodes.say.retry.attempts", "schema"),
        (
            "{type: answer}",
            "{type: answer, timeout: 0}",
            "nodes.say.timeout: input should be greater than 0",
            "raise",
        ),
        ("  say: ", "  plan: ", "'plan' is a name of the frame", "plan_it"),
        ("  say: ", "  answer: ", "'answer' is a name of the frame", "answer_it"),
        ("  - {source: say, target: END}\n", "", "nodes.say: no edge leads on from say", "add"),
        ("target: END}", "target: cut}", "nodes.cut: it never leads to END", "END"),
        ("source: note, target: say", "source: note, target: END", "nodes.say: nothing leads to it", "edge"),
        ("{type: answer}", "{type: vote}", "it reads records of the schema facts", "another schema"),
        (
            "{type: answer}",
            "{type: filter, with: {evidence: true}}",
            "it gives records and leads to END",
            "answer",
        ),
        ("{type: answer}", "{type: read}", "the type read reads one item at a time", "map"),
        (
            "{type: read}",
            "{type: read, with: {labels: [a, b]}}",
            "labels belong to the schema label",
            "schema",
        ),
        ("map: {over: cut, as: part, node: note}", "target: note", "reads one item at a time", "map"),
        (
            "edges:",
            "budget: {calls: 0}\nedges:",
            "flow.yaml:7: budget.calls: input should be greater",
            "leave",
        ),
        ("edges:", "budget: {seconds: 0}\nedges:", "budget.seconds: input should be greater than 0", "raise"),
        ("edges:", "state: {spans: {type: answer}}\nedges:", "'spans' is a key of the frame", "my_spans"),
        (
            "edges:",
            "state: {mine: {type: answer}}\nedges:",
            "flow.yaml:7: state.mine: no node writes it",
            "writes",
        ),
    ],
)
def test_a_mistake_is_named_with_its_line_and_remedy(tmp_path, old, new, message, hint):
    error = refused(tmp_path, GOOD.replace(old, new, 1))
    assert message in error.message
    assert hint in error.hint


LOOP = GOOD.replace(
    "{source: say, target: END}",
    "{source: say, match: {path: no_information, cases: {true: cut}, default: END}}",
)


def test_a_cycle_needs_a_stop(tmp_path):
    error = refused(tmp_path, LOOP)
    assert "the cycle through cut, note, say never stops" in error.message
    assert "max_visits" in error.hint
    assert opened(tmp_path, LOOP.replace("{type: split}", "{type: split, max_visits: 2}")).name == "small"


ROUNDS = """\
version: 1
name: rounds
nodes:
  cut: {type: split}
  pick: {type: select, with: {k: 1}, max_visits: 12}
  again: {type: filter, with: {words: [e]}}
  more: {type: filter, with: {words: [a]}}
  both: {type: answer, reads: pick, defer: true}
  say: {type: answer, reads: pick}
edges:
  - {source: START, target: cut}
  - {source: cut, target: pick}
  - {source: pick, targets: [again, more]}
  - {source: again, target: both}
  - {source: more, target: both}
  - {source: both, match: {path: no_information, cases: {true: pick}, default: say}}
  - {source: say, target: END}
"""


def test_what_follows_a_cycle_runs_once(tmp_path):
    flow = opened(tmp_path, ROUNDS)
    assert {name: site.visits for name, site in flow.wiring.sites.items()}["say"] == 1
    beside = ROUNDS.replace("[again, more]", "[again, say]")
    for gone in ("  more: {type: filter, with: {words: [a]}}\n", "  - {source: more, target: both}\n"):
        beside = beside.replace(gone, "")
    assert "say, which is not, would run once for each round" in refused(tmp_path, beside).message
    branch = ROUNDS.replace(
        "{source: more, target: both}",
        "{source: more, match: {path: no_information, cases: {true: say}, default: both}}",
    )
    assert "more is in a cycle; say, which is not" in refused(tmp_path, branch).message


TWICE = """\
version: 1
name: twice
state:
  notes: {type: records, reducer: append}
nodes:
  cut: {type: split, with: {chunk_tokens: 200}}
  note: {type: read, writes: notes}
  pick: {type: select, with: {k: 1000}, reads: cut}
  more: {type: read, with: {question: "Which numbers stand there?"}, writes: notes}
  table: {type: list, reads: notes}
edges:
  - {source: START, target: cut}
  - {source: cut, map: {over: cut, as: part, node: note}}
  - {source: note, target: pick}
  - {source: pick, map: {over: pick, as: part, node: more}}
  - {source: more, target: table}
  - {source: table, target: END}
"""


def test_two_reads_of_the_same_chunks_need_a_key_for_each(tmp_path):
    error = refused(tmp_path, TWICE)
    assert "flow.yaml:4: state.notes: note and more write it" in error.message
    assert "reads: [note, more]" in error.hint
    apart = TWICE.replace(", writes: notes", "").replace("reads: notes", "reads: [note, more]")
    apart = apart.replace("state:\n  notes: {type: records, reducer: append}\n", "")
    assert [port.key for port in opened(tmp_path, apart).wiring.sites["table"].ports] == [
        "note_out",
        "more_out",
    ]


def test_what_parallel_branches_join_in_waits_for_them(tmp_path):
    text = """\
version: 1
name: two
nodes:
  one: {type: workflow, with: {name: lexical}}
  left: {type: workflow, with: {name: spans}}
  right: {type: workflow, with: {name: gist}}
  say: {type: answer}
edges:
  - {source: START, target: one}
  - {source: one, targets: [left, right]}
  - {source: left, target: say}
  - {source: right, target: say}
  - {source: say, target: END}
"""
    assert "it joins the branches of one" in refused(tmp_path, text).message
    assert (
        opened(tmp_path, text.replace("say: {type: answer}", "say: {type: answer, defer: true}")).depth == 1
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x [1]\nb: *x\n", ":1: anchors and aliases"),
        ("a: 1\nb: *x\n", ":2: anchors and aliases"),
        ("a: !!python/object/apply:os.system [id]\n", ":1: the tag tag:yaml.org,2002:python"),
        ("a: !!binary aGVsbG8=\n", "the tag"),
        ("a: !include /etc/passwd\n", "the tag !include"),
        ("<<: {a: 1}\n", "merge keys"),
        ("a: 1\nb: 2\na: 3\n", ":3: the key 'a' stands twice, first in line 1"),
        ("? [a, b]\n: 1\n", "a key must be a word"),
        ("[" * 100_000, "nested more than"),
        ("- " * 1000, "nested more than"),
        ("a: [1\n", "not valid YAML"),
        ("a: \x00\n", "not valid YAML"),
        ("a: 2001-99-99\n", "cannot be read"),
        ("a: " + "9" * 5000, "cannot be read"),
        ("--- 1\n--- 2\n", "not valid YAML"),
        ("", "a mapping of keys"),
        ("just words", "a mapping of keys"),
    ],
)
def test_yaml_that_is_more_than_plain_values_is_refused(tmp_path, text, message):
    assert message in refused(tmp_path, text).message


def test_a_bomb_of_aliases_is_refused_before_it_is_built():
    levels = ["l0: &l0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 12)]
    with pytest.raises(ConfigError, match="anchors"):
        read_source("\n".join(levels), "bomb.yaml")


@pytest.mark.parametrize(
    "name",
    [
        "../secret.md",
        "/etc/passwd",
        "prompts/../../secret.md",
        "~/secret.md",
        "C:\\secret.md",
        "link.md",
        "",
        "no.md",
    ],
)
def test_a_prompt_is_a_file_below_the_workflow(tmp_path, name):
    folder = tmp_path / "flows"
    folder.mkdir()
    (tmp_path / "secret.md").write_text("the secret")
    (folder / "link.md").symlink_to(tmp_path / "secret.md")
    error = refused(folder, GOOD.replace("{type: read}", f"{{type: read, with: {{prompt: '{name}'}}}}"))
    assert "flow.yaml:5: nodes.note.with.prompt" in error.message
    assert "the secret" not in str(error)


def test_a_pipe_or_a_binary_is_no_prompt(tmp_path):
    (tmp_path / "p.md").write_bytes(b"\xff\xfe\x00")
    text = GOOD.replace("{type: read}", "{type: read, with: {prompt: p.md}}")
    assert "not text in UTF-8" in refused(tmp_path, text).message
    os.remove(tmp_path / "p.md")
    os.mkfifo(tmp_path / "p.md")
    assert "cannot be read" in refused(tmp_path, text).message


@pytest.mark.parametrize(
    "name", ["os:system", "agentctx.api:Context", "__import__('os')", "${HOME}", "{{ 7 * 7 }}"]
)
def test_what_looks_like_code_is_a_name_that_is_not_known(tmp_path, name):
    assert (
        "there is no node type"
        in refused(tmp_path, GOOD.replace("{type: read}", f'{{type: "{name}"}}')).message
    )
    text = GOOD.replace("{type: answer}", f'{{type: workflow, with: {{name: "{name}"}}}}')
    assert "there is no strategy" in refused(tmp_path, text).message


def test_a_file_may_not_run_itself(tmp_path):
    text = GOOD.replace("{type: answer}", "{type: definition, with: {file: %s}}")
    (tmp_path / "other.yaml").write_text(text % "flow.yaml")
    assert (
        "runs itself: flow.yaml -> other.yaml -> flow.yaml" in refused(tmp_path, text % "other.yaml").message
    )


def test_a_missing_or_huge_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="larger than 256 kB"):
        opened(tmp_path, "a: " + "x" * MOST_BYTES)
    with pytest.raises(ConfigError, match="larger than 256 kB"):
        read_source("a: " + "x" * MOST_BYTES, "flow.yaml")
    with pytest.raises(InputError, match="there is no file"):
        open_definition(tmp_path / "no.yaml")


TOKENS = st.sampled_from(
    [*"{}[]:,&*!|>-?#%'\" \n\t", "  ", "- ", ": ", "type", "nodes", "edges", "split", "read", "target", "END"]
    + [
        "!!python/name:os.system",
        "&a",
        "*a",
        "<<",
        "__import__",
        "with",
        "map",
        "max_visits",
        "1e999",
        "0x1f",
    ]
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(TOKENS, max_size=60).map("".join) | st.text(max_size=200))
def test_arbitrary_text_is_refused_or_read_and_never_more(text):
    try:
        read_source(text, "fuzz.yaml")
    except ConfigError:
        return
    assert isinstance(yaml.safe_load(text), dict)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_a_good_file_with_damage_is_refused_or_right(tmp_path_factory, data):
    """A right file with stretches cut out and exchanged is a typed error or a workflow, never a bug."""
    text = (Path(__file__).parents[3] / "examples/workflows/contract_terms.yaml").read_text()
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(len(text), start + 40)))
        put = data.draw(
            TOKENS | st.sampled_from(["cut", "note", "join", "more", "say", "parts", "notes", "START"])
        )
        text = text[:start] + put + text[end:]
    folder = tmp_path_factory.getbasetemp()
    try:
        opened(folder, text)
    except AgentctxError:
        return
