"""Rotary embeddings that depend on the length of the sequence: longrope, dynamic scaling."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from model_changes import GREEDY, LONG, NEW, reusable, short_chunks  # noqa: F401

from rapid_llm.config import SpeculationConfig
from rapid_llm.decoder import RapidDecoder
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.session import Session
from rapid_llm.errors import ModelError

SWITCH = 256


def switching(architecture="phi3", rope_type="longrope"):
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 8.0}
    if rope_type == "longrope":
        rope |= {"original_max_position_embeddings": SWITCH, "short_factor": [1.0] * 4,
                 "long_factor": [1.0, 2.0, 4.0, 8.0]}  # fmt: skip
    return tiny_model(architecture, eos_token_id=None, max_position_embeddings=2048,
                      original_max_position_embeddings=SWITCH, rope_parameters=rope)  # fmt: skip


def whole(a_model, prompt, new):
    """By passes over the whole sequence, each without a cache."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(new):
            ids.append(int(a_model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("architecture", ["phi3", "llama", "qwen3"])
@pytest.mark.parametrize("length", [SWITCH - 6, SWITCH - 1, SWITCH, SWITCH + 1, SWITCH + 90])
def test_longrope_goes_by_the_length_of_the_whole_sequence(architecture, length):
    decoder = RapidDecoder(switching(architecture), tiny_tokenizer())
    prompt = LONG[:length]
    expected = whole(switching(architecture), prompt, NEW)
    assert decoder.generate(prompt, sampling=GREEDY).token_ids == expected
    drafted = decoder.generate(
        prompt,
        prompt[20:],
        sampling=GREEDY,
        speculation=SpeculationConfig(mode="exact", gamma=4),
    )
    assert drafted.token_ids == expected


def test_no_draft_crosses_the_switch_where_a_rejection_would_read_the_document_twice(monkeypatch):
    read, extend = [], Session.extend

    def watched(self, tokens, keep=None, whole=None):
        read.append((self.length, self.length + len(tokens)))
        return extend(self, tokens, keep, whole)

    monkeypatch.setattr(Session, "extend", watched)
    prompt = LONG[: SWITCH - 3]
    config = SpeculationConfig(mode="exact", gamma=6)
    # The drafter's own sequence stays below the switch.
    RapidDecoder(switching(), tiny_tokenizer()).generate(
        prompt, prompt[40:], sampling=GREEDY, speculation=config
    )
    assert (SWITCH - 4, SWITCH) in read
    assert all(start == SWITCH - 1 for start, end in read if start < SWITCH < end)


def test_kv_of_one_side_of_the_switch_is_not_taken_on_the_other(tmp_path):
    scaled = switching()
    decoder = RapidDecoder(scaled, tiny_tokenizer(), kv_cache_dir=tmp_path)
    below, above = LONG[: SWITCH - 50], LONG[: SWITCH + 1100]
    for prompt in (below, above, below, above):
        result = decoder.generate(prompt, sampling=GREEDY)
        assert result.token_ids == whole(switching(), prompt, NEW)
    assert result.stats.cached_tokens == reusable(above)
    later = RapidDecoder(switching(), tiny_tokenizer(), kv_cache_dir=tmp_path)
    assert later.generate(below, sampling=GREEDY).stats.cached_tokens == 0
    assert later.generate(above, sampling=GREEDY).stats.cached_tokens == reusable(above)


def test_verification_across_the_switch_gives_each_row_its_own_embedding():
    scaled = switching()
    runner = ModelRunner(scaled, "x")
    session = Session(runner, runner.new_cache(400))
    ids = torch.tensor(LONG[: SWITCH + 8])
    with torch.inference_mode():
        session.prefill(ids[: SWITCH - 4].tolist())
        rows = session.extend(ids[SWITCH - 4 :], 10)
        expected = [scaled(ids[None, :end]).logits[0, -1] for end in range(SWITCH - 1, SWITCH + 9)]
        torch.testing.assert_close(rows, torch.stack(expected), rtol=1e-4, atol=1e-4)
        session.rollback(SWITCH - 2)
        back = session.extend(ids[SWITCH - 2 : SWITCH])
    torch.testing.assert_close(back, torch.stack(expected[:2]), rtol=1e-4, atol=1e-4)


def test_dynamic_scaling_is_refused_where_each_token_changes_all():
    runner = ModelRunner(switching("llama", "dynamic"), "some-model")
    session = Session(runner, runner.new_cache(2100))
    ids = torch.randint(3, 64, (2050,))
    with torch.inference_mode():
        session.prefill(ids[:2000].tolist())
        expected = runner.model(ids[None, :2001]).logits[0, -1:]
        torch.testing.assert_close(session.extend(ids[2000:2001]), expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(ModelError, match=r"some-model.*dynamically.*2048 tokens.*yarn"):
            session.extend(ids[2001:])
