"""RAPID for LlamaIndex: swap the LLM, keep the pipeline."""

from importlib.metadata import PackageNotFoundError, version

from llama_index.llms.rapid.embedding import RapidEmbedding
from llama_index.llms.rapid.llm import RapidLLM
from llama_index.llms.rapid.synthesizer import RapidSynthesizer
from llama_index.llms.rapid.templates import PipelineError

try:
    __version__ = version("llama-index-llms-rapid")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0+unknown"

__all__ = ["PipelineError", "RapidEmbedding", "RapidLLM", "RapidSynthesizer", "__version__"]
