"""RAPID for LlamaIndex: swap the LLM, keep the pipeline."""

from llama_index.llms.rapid.embedding import RapidEmbedding
from llama_index.llms.rapid.llm import RapidLLM
from llama_index.llms.rapid.synthesizer import RapidSynthesizer
from llama_index.llms.rapid.templates import PipelineError

__all__ = ["PipelineError", "RapidEmbedding", "RapidLLM", "RapidSynthesizer"]
