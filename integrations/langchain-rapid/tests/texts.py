"""Three documents written for the tests, and what they are split into."""

from __future__ import annotations

from langchain_core.documents import Document
from langchain_text_splitters import RecursiveCharacterTextSplitter

LIGHTHOUSE = """\
The lighthouse of Vell stands on a rock two miles off the coast.

Its keeper is Orsina Dray, who took over from her uncle. She winds the clockwork of the lamp \
every four hours and writes the weather into a green book.

In winter the supply boat cannot land for weeks. The keeper then lives on smoked fish, hard \
bread and the honey of her own bees.

The lamp was lit for the first time in 1861. Its lens has the height of a tall man and was \
ground in one piece by a glassmaker who never saw the sea."""

BAKERY = """\
The bakery in Tanner Street opens at five in the morning.

Its rye loaf is made with a sourdough that is older than the baker. The dough rests for \
eighteen hours in baskets of willow.

On Fridays the baker, Tomas Ilk, sells a cake of plums and poppy seed, which is gone before \
eight.

The oven is fired with beech. Its bricks were laid by a chimney sweep in exchange for bread."""

LIBRARY = """\
The library of Marrow Hill lends books, tools and musical instruments.

Whoever borrows a cello must play it once a month in the reading room. The librarian, Ines \
Bor, keeps the list and listens to all of them.

Books with notes in the margins are not withdrawn: they have a shelf of their own on the \
second floor.

The building was a cattle market before. Iron rings are still in the walls, and children \
hang their coats on them."""

TEXTS = {"lighthouse.txt": LIGHTHOUSE, "bakery.txt": BAKERY, "library.txt": LIBRARY}


def loaded() -> list[Document]:
    """As a loader returns them."""
    return [
        Document(text, metadata={"source": name, "title": name.removesuffix(".txt")})
        for name, text in TEXTS.items()
    ]


def split() -> list[Document]:
    """Chunks of about a paragraph, with where they start."""
    splitter = RecursiveCharacterTextSplitter(chunk_size=230, chunk_overlap=0, add_start_index=True)
    return splitter.split_documents(loaded())
