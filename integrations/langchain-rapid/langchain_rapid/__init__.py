"""RAPID for LangChain: long-context answers, drafted from the chain's retrieved chunks."""

from langchain_rapid.chains import create_rapid_documents_chain
from langchain_rapid.chat_models import ChatRapid
from langchain_rapid.embeddings import RapidEmbeddings
from langchain_rapid.errors import GenerationTimeoutError, RetrievalError
from langchain_rapid.llms import RapidLLM
from langchain_rapid.settings import VERSION
from langchain_rapid.statistics import (
    MessageOutputParser,
    RapidStats,
    RapidStatsCallbackHandler,
    get_rapid_stats_callback,
    rapid_stats,
)

__version__ = VERSION

__all__ = [
    "ChatRapid",
    "GenerationTimeoutError",
    "MessageOutputParser",
    "RapidEmbeddings",
    "RapidLLM",
    "RapidStats",
    "RapidStatsCallbackHandler",
    "RetrievalError",
    "__version__",
    "create_rapid_documents_chain",
    "get_rapid_stats_callback",
    "rapid_stats",
]
