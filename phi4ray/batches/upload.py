"""A `multipart/form-data` body taken apart as it comes: small fields, and one file in pieces."""

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header


class FormError(Exception):
    """The body is no form that can be read."""


class UploadForm:
    """The fields of a form, and its file's name; the file's content is given on, never kept."""

    def __init__(self, content_type: str) -> None:
        """Raises:
        FormError: the content type is another one.
        """
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise FormError("send the file as multipart/form-data, as OpenAI's clients do")
        self.filename: str | None = None
        self.whole = False
        """Whether the form's end was seen."""
        self._fields: dict[str, bytearray] = {}
        self._headers: dict[str, bytes] = {}
        self._header, self._value = bytearray(), bytearray()
        self._field: bytearray | None = None
        self._content = bytearray()
        try:
            self._parser = MultipartParser(
                options[b"boundary"],
                {
                    "on_part_begin": self._headers.clear,
                    "on_header_field": self._on_header_field,
                    "on_header_value": self._on_header_value,
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers_finished,
                    "on_part_data": self._on_part_data,
                    "on_end": self._on_end,
                },
            )
        except FormParserError as error:
            raise FormError(f"the form cannot be read: {error}") from error

    def field(self, name: str) -> str | None:
        """The value of a field that has come."""
        value = self._fields.get(name)
        return None if value is None else value.decode("utf-8", "replace")

    def feed(self, data: bytes) -> bytes:
        """Take the next piece of the body; gives what it holds of the file.

        The fields are kept: the caller bounds what comes besides the file.

        Raises:
            FormError: it is no form.
        """
        self._content.clear()
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise FormError(f"the form cannot be read: {error}") from error
        return bytes(self._content)

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._header.decode("latin-1").lower()] = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get("content-disposition", b""))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if name == "file":
            if self.filename is not None:
                raise FormError("send one file at a time")
            self._field = None
            self.filename = options.get(b"filename", b"file").decode("utf-8", "replace")
        else:
            self._field = self._fields.setdefault(name, bytearray())

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._field is None:
            self._content += data[start:end]
        else:
            self._field += data[start:end]

    def _on_end(self) -> None:
        self.whole = True
