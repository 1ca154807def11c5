"""``ChatRapid`` is made without a model, and loads or shares one when it is needed."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rapid_llm.decoder import RapidDecoder
from rapid_llm.errors import ModelError
from tiny import tiny_model, tiny_tokenizer

from langchain_rapid import ChatRapid, RapidLLM


def test_neither_import_nor_construction_imports_torch():
    code = (
        "import sys; from langchain_rapid import ChatRapid, RapidLLM; ChatRapid(); RapidLLM(); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_model_is_looked_for_when_it_is_needed():
    llm = ChatRapid(model="no-such-file.gguf")
    with pytest.raises(ModelError, match="no-such-file"):
        llm.invoke("Hello")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tempature": 1.0}, "tempature"),
        ({"temperature": -1.0}, "at least 0"),
        ({"max_tokens": 0}, "at least 1"),
        ({"timeout": 0}, "above 0"),
        ({"mode": "fast"}, "mode"),
        ({"gamma": 0}, "at least 1"),
        ({"gamma": "all"}, "gamma"),
        ({"drafter_quantization": "int3"}, "drafter_quantization"),
        ({"kv_cache_bytes": -1}, "kv_cache_bytes"),
        ({"stop": [""]}, "non-empty"),
        ({"truncate": "end"}, "truncate"),
    ],
)
def test_wrong_fields_are_refused_at_once(wrong, message):
    with pytest.raises(ValidationError, match=message):
        ChatRapid(**wrong)


def test_standard_parameters_of_hosted_models_are_accepted(tiny_folder):
    ChatRapid(api_key="none", max_retries=2, timeout=60)
    llm = ChatRapid(model=Path(tiny_folder), max_tokens=2)
    assert llm.invoke("Hello").response_metadata["model_name"] == tiny_folder


def test_traces_name_the_versions():
    for llm in (ChatRapid(), RapidLLM()):
        assert llm.metadata is not None
        assert llm.metadata["lc_versions"].keys() >= {"langchain-core", "langchain-rapid"}


def test_a_decoder_names_the_model(decoder):
    assert ChatRapid(decoder=decoder).model == "tiny-0"
    assert ChatRapid(decoder=decoder).drafter is None
    with pytest.raises(ValidationError, match="leave one of them out"):
        ChatRapid(decoder=decoder, model="other")
    with pytest.raises(ValidationError, match="type str is not allowed"):
        ChatRapid(decoder="smollm2-135m")
    two = RapidDecoder(
        tiny_model(0), tiny_tokenizer(), tiny_model(1), name="one", drafter_name="two"
    )
    assert ChatRapid(decoder=two).drafter == "two"


def test_objects_share_one_copy_of_the_weights_and_free_it(tiny_folder):
    def weights(llm: ChatRapid | RapidLLM) -> Any:
        return llm._decoder_for(llm.model).target.model

    first, second = ChatRapid(model=tiny_folder), ChatRapid(model=tiny_folder, temperature=1.0)
    text = RapidLLM(model=tiny_folder)
    assert weights(first) is weights(second) is weights(text)
    assert weights(first.model_copy(update={"seed": 3})) is weights(first)
    alive = weakref.ref(weights(first))
    del first, second, text
    gc.collect()
    assert alive() is None


def test_the_decoders_own_options_reach_it(tiny_folder, tmp_path):
    options = {"model": tiny_folder, "max_tokens": 4, "drafter_quantization": "int8"}
    prompt, kept = "abcdefgh" * 150, tmp_path / "kv"
    for cached in (False, True):  # from the folder, as nothing is kept in memory
        llm = ChatRapid(**options, kv_cache_bytes=0, kv_cache_dir=kept)
        for again in (False, True):
            rapid = llm.invoke(prompt).response_metadata["rapid"]
            assert (rapid["cached_tokens"] > 0) == (cached or again)
        assert len(list(kept.glob("*.safetensors"))) == 1
    assert llm._decoder_for(tiny_folder).draft_runner.name == f"{tiny_folder} (int8)"
    assert llm._identifying_params["drafter_quantization"] == "int8"
    without = ChatRapid(**options, kv_cache_bytes=0)
    for _ in range(2):
        assert without.invoke(prompt).response_metadata["rapid"]["cached_tokens"] == 0


def test_neither_dump_nor_repr_holds_decoder_or_documents(decoder):
    from langchain_core.load import dumps
    from langchain_core.runnables import RunnableLambda

    llm = ChatRapid(decoder=decoder, retriever=RunnableLambda(lambda _: []), documents="SECRET")
    for shown in (repr(llm), str(llm), dumps(llm), str(llm.asdict()), str(llm.model_dump())):
        assert "SECRET" not in shown
        assert "RapidDecoder" not in shown
