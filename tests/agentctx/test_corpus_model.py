"""The embedded model over an index of `examples/`: it answers from what it kept, and computes little."""

from pathlib import Path

import pytest

from agentctx.api import Context
from agentctx.corpus.attach import with_index
from agentctx.corpus.index import Index
from agentctx.memory.documents import open_documents
from agentctx.models.load import open_model
from agentctx.paths import Paths

pytestmark = pytest.mark.model
EXAMPLES = Path(__file__).parents[2] / "examples"


def test_a_question_over_an_index_is_answered_from_kept_kv(embedded, tmp_path):
    paths = Paths(*(tmp_path / name for name in ("cache", "data", "state", "config")))
    paths.cache.mkdir()
    paths.models.symlink_to(embedded.models)
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "lease.md").write_text((EXAMPLES / "lease.md").read_text())
    Index.open(paths.index, open_model("smollm2", paths=paths)).add(
        str(folder), open_documents([folder]).documents
    )
    model = with_index(open_model("smollm2", paths=paths), paths)  # with nothing in memory
    context = Context.open(folder, model=model, paths=paths)
    answer = context.ask("How much notice must a party give to end the lease early?")
    assert answer.strategy == "kv_retrieval"
    assert "five months" in "".join(one.quote for one in answer.citations)
    assert all(one.verdict == "supported" for one in answer.citations)
    assert answer.usage.computed_tokens < answer.usage.reused_tokens
    assert not [one for one in answer.warnings if one.code in ("kv", "not_indexed")]
