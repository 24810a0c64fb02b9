"""docs/seed-map.md: every symbol of the contract is where the page says."""

from __future__ import annotations

import importlib
import inspect
import re
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest

from pymllm.attention import AttnMetaDataBase
from pymllm.engine.outputs import ReqStep, ReqTrajectory
from pymllm.moe import DispatcherOutput, DispatchMetadata, ExpertExecutionMetadata, RouterMetadata

PAGE = Path(__file__).parents[1] / "docs" / "seed-map.md"
ROW = re.compile(r"^\| (.*?) \| `([\w.]+):([\w.]+)` \|$")


def sections():
    """Rows (symbol, module, path) by the number of their section."""
    found, rows = {}, None
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            rows = found.setdefault(int(line[3]), [])
        elif line.startswith("| ") and "---" not in line and not line.startswith("| symbol"):
            match = ROW.match(line)
            assert match is not None, f"not a row of this page: {line}"
            rows.append(match.groups())
    return found


ROWS = [row for rows in sections().values() for row in rows]


@pytest.mark.parametrize("symbol, module, path", ROWS, ids=[path for _, _, path in ROWS])
def test_the_symbol_is_in_its_home(symbol, module, path):
    place = importlib.import_module(module)
    for name in path.split("."):
        place = getattr(place, name)
    last = path.rpartition(".")[2]
    assert last in symbol, "the symbol keeps its name"


def test_every_section_is_there_and_no_home_twice():
    assert sorted(sections()) == [1, 2, 3, 4, 5, 6]
    counts = Counter(f"{module}:{path}" for _, module, path in ROWS)
    assert [home for home, count in counts.items() if count > 1] == []


def test_each_package_lists_all_that_it_exports():
    for number, package in ((4, "pymllm.moe"), (5, "pymllm.attention")):
        on_page = {path for _, module, path in sections()[number] if module == package and "." not in path}
        assert on_page <= set(importlib.import_module(package).__all__)


# Names of data, which have no home of their own.
DATA = {
    AttnMetaDataBase: (
        "is_prefill enforce_eager cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k slot_mapping context_lens "
        "page_tables status_table page_size block_size kv_cache_layout prefix_causal mask_prefix_hole"
    ),
    RouterMetadata: "router_logits topk_ids topk_weights",
    DispatchMetadata: (
        "num_tokens hidden_size dtype device send_splits recv_splits recv_hidden_states recv_local_expert "
        "recv_token_indices recv_weights total_recv_slots"
    ),
    ExpertExecutionMetadata: (
        "packed_token_ids packed_local_expert_ids packed_weights num_slots sorted_slot_ids expert_block_ids "
        "num_tokens_post_padded"
    ),
    DispatcherOutput: "metadata recv_hidden_states recv_local_expert_ids recv_weights",
    ReqStep: (
        "step_id step_time is_prefill num_generated_tokens running_token_ids block_size buffer_bids block_trace"
    ),
    ReqTrajectory: (
        "req_id token_ids trajectory is_truncated max_new_tokens_reached max_model_len_reached max_nfe_reached "
        "max_repetition_run_reached eos_token_generated completion_reason text full_token_ids full_text"
    ),
}


@pytest.mark.parametrize("cls", DATA, ids=lambda cls: cls.__name__)
def test_the_fields_of_data_are_named_as_in_the_contract(cls):
    known = {field.name for field in fields(cls)}
    known |= {name for name, member in inspect.getmembers(cls) if isinstance(member, property)}
    assert set(DATA[cls].split()) - known == set()
