"""PDFs made by hand."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence


def pdf(*pages: str | Sequence[str] | bytes) -> bytes:
    """A PDF with lines of Helvetica on each page, or with the content stream that is given."""
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"",
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
    ]
    kids = []
    for page in pages:
        content = zlib.compress(page if isinstance(page, bytes) else _content(page))
        head = b"<< /Length %d /Filter /FlateDecode >>" % len(content)
        objects.append(b"%s\nstream\n%s\nendstream" % (head, content))
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R "
            b"/Resources << /Font << /F1 3 0 R >> >> >>" % len(objects)
        )
        kids.append(b"%d 0 R" % len(objects))
    objects[1] = b"<< /Type /Pages /Kids [%s] /Count %d >>" % (b" ".join(kids), len(kids))
    data, places = b"%PDF-1.7\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    return data + (
        b"xref\n0 %d\n0000000000 65535 f \n%strailer << /Size %d /Root 1 0 R >>\n"
        b"startxref\n%d\n%%%%EOF" % (len(objects) + 1, table, len(objects) + 1, len(data))
    )


def _content(page: str | Sequence[str]) -> bytes:
    lines = [page] if isinstance(page, str) else page
    shown = "".join(f"({line}) Tj 0 -16 Td " for line in lines if line)
    return f"BT /F1 12 Tf 20 760 Td {shown}ET".encode("cp1252") if shown else b""


# Encrypted with a password that is needed to open it (RC4, 128 bits).
LOCKED = base64.b64decode(
    "JVBERi0xLjMKJeLjz9MKMSAwIG9iago8PAovUHJvZHVjZXIgPGU4YTc3ZTNiNTE+Cj4+CmVuZG9iagoyIDAgb2JqCjw8"
    "Ci9UeXBlIC9QYWdlcwovQ291bnQgMQovS2lkcyBbIDQgMCBSIF0KPj4KZW5kb2JqCjMgMCBvYmoKPDwKL1R5cGUgL0Nh"
    "dGFsb2cKL1BhZ2VzIDIgMCBSCj4+CmVuZG9iago0IDAgb2JqCjw8Ci9UeXBlIC9QYWdlCi9SZXNvdXJjZXMgPDwKPj4K"
    "L01lZGlhQm94IFsgMC4wIDAuMCAxMDAgMTAwIF0KL1BhcmVudCAyIDAgUgo+PgplbmRvYmoKNSAwIG9iago8PAovViAy"
    "Ci9SIDMKL0xlbmd0aCAxMjgKL1AgNDI5NDk2NzI5MgovRmlsdGVyIC9TdGFuZGFyZAovTyA8NDJhZTJmOTk2NWM2MDVl"
    "YmVjMmI3MDRkMzQ1MTljODQ4MTVlMjQzYmU2N2ZlYmJmMzVlYTU4MTczYjczMTQ4Yj4KL1UgPGRlNmI5ZWIzYzFhMjQ3"
    "NjA0NGNjMDYxM2IyODUxNTI1MjhiZjRlNWU0ZTc1OGE0MTY0MDA0ZTU2ZmZmYTAxMDg+Cj4+CmVuZG9iagp4cmVmCjAg"
    "NgowMDAwMDAwMDAwIDY1NTM1IGYgCjAwMDAwMDAwMTUgMDAwMDAgbiAKMDAwMDAwMDA1OSAwMDAwMCBuIAowMDAwMDAw"
    "MTE4IDAwMDAwIG4gCjAwMDAwMDAxNjcgMDAwMDAgbiAKMDAwMDAwMDI2MSAwMDAwMCBuIAp0cmFpbGVyCjw8Ci9TaXpl"
    "IDYKL1Jvb3QgMyAwIFIKL0luZm8gMSAwIFIKL0lEIFsgPGUwNTc4NGNkYTNiNWQzYWFmZTZjMzk0ZmUwOTA3YjE4PiA8"
    "ZTA1Nzg0Y2RhM2I1ZDNhYWZlNmMzOTRmZTA5MDdiMTg+IF0KL0VuY3J5cHQgNSAwIFIKPj4Kc3RhcnR4cmVmCjQ3Ngol"
    "JUVPRgo="
)

# Encrypted with an owner's password only (AES, 256 bits): "The tower opens in May."
OPEN = base64.b64decode(
    "JVBERi0xLjMKJeLjz9MKMSAwIG9iago8PAovVHlwZSAvQ2F0YWxvZwovUGFnZXMgMiAwIFIKPj4KZW5kb2JqCjIgMCBv"
    "YmoKPDwKL1R5cGUgL1BhZ2VzCi9LaWRzIFsgMyAwIFIgXQovQ291bnQgMQo+PgplbmRvYmoKMyAwIG9iago8PAovVHlw"
    "ZSAvUGFnZQovUGFyZW50IDIgMCBSCi9NZWRpYUJveCBbIDAgMCA0MDAgMjAwIF0KL1Jlc291cmNlcyA8PAovRm9udCA8"
    "PAovRjEgNCAwIFIKPj4KPj4KL0NvbnRlbnRzIDUgMCBSCj4+CmVuZG9iago0IDAgb2JqCjw8Ci9UeXBlIC9Gb250Ci9T"
    "dWJ0eXBlIC9UeXBlMQovQmFzZUZvbnQgL0hlbHZldGljYQo+PgplbmRvYmoKNSAwIG9iago8PAovTGVuZ3RoIDgwCj4+"
    "CnN0cmVhbQrnyRtFoWqIW776GuVRG2qpp/vmpbNpUUGa5K1+B2hen05klD2pg5Cffq3UnzFC6ll5ejbsJlEXNZQ067BS"
    "4FzNGfdEg0hApgb+epy+uPkr7AplbmRzdHJlYW0KZW5kb2JqCjYgMCBvYmoKPDwKL1YgNQovUiA2Ci9MZW5ndGggMjU2"
    "Ci9QIDQyOTQ5NjcyOTIKL0ZpbHRlciAvU3RhbmRhcmQKL08gPDM3NWJhZjEzMjlkYjVmODVmMDcwM2U0OGQwMmMwZjdm"
    "MGJkZGZkYjQ0OTU3NWNhZDNlOTc1NDExOTk1OGUxOWFmYjQ4YjBkZTE4NjcwYjAwNDhiYmQ5NTcyYTA1MDdhYj4KL1Ug"
    "PDYwMWFiZDU1MzBiYmNiY2MxZjVhOWNhZTg0ZTk0MTFkNTAwOTc1NmRmNWM4YmNjYWZhNzlmZDE1ODc4NzhiOTJhN2Y3"
    "Y2Q1NGEzMjEyMTVkNmUzMDc5ODRiZmQ2MjUxNz4KL0NGIDw8Ci9TdGRDRiA8PAovQXV0aEV2ZW50IC9Eb2NPcGVuCi9D"
    "Rk0gL0FFU1YzCi9MZW5ndGggMzIKPj4KPj4KL1N0bUYgL1N0ZENGCi9TdHJGIC9TdGRDRgovT0UgPDZjMGUzMzQ0Njdk"
    "MzZhMjNlOGIzMzM5ODgyYjNkMTcyY2ZmNmJhMjZmYWY0MWY0NWVhZDI4MjE3NDg2NDJmNzI+Ci9VRSA8ZmQyMDZjNDEw"
    "ZTE5NjE3NDNiMzI2NjExYTllNjU1NTY3MWE2N2EwZmIxYjYyNzc0ODg1MTAwNjMzMzRhYmUzMT4KL1Blcm1zIDw0MjVi"
    "MTJmZTkzZDIxM2U3MTZlMzQ2Yzg4Y2M4ZDdjYz4KPj4KZW5kb2JqCnhyZWYKMCA3CjAwMDAwMDAwMDAgNjU1MzUgZiAK"
    "MDAwMDAwMDAxNSAwMDAwMCBuIAowMDAwMDAwMDY0IDAwMDAwIG4gCjAwMDAwMDAxMjMgMDAwMDAgbiAKMDAwMDAwMDI1"
    "MSAwMDAwMCBuIAowMDAwMDAwMzIxIDAwMDAwIG4gCjAwMDAwMDA0NTEgMDAwMDAgbiAKdHJhaWxlcgo8PAovU2l6ZSA3"
    "Ci9Sb290IDEgMCBSCi9JRCBbIDwxNWIzYjMzN2I1M2YwZDI4NzdjY2RiMzgxMjYxYTMzMj4gPDE1YjNiMzM3YjUzZjBk"
    "Mjg3N2NjZGIzODEyNjFhMzMyPiBdCi9FbmNyeXB0IDYgMCBSCj4+CnN0YXJ0eHJlZgoxMDA2CiUlRU9GCg=="
)
