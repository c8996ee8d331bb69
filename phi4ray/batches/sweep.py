"""What nobody can ask for any more goes out of the store: expired files, and what crashes left."""

from phi4ray.batch.executor import threaded
from phi4ray.batches.config import DAY_S
from phi4ray.batches.records import age_s, is_result
from phi4ray.batches.store import Key, Store, readable
from phi4ray.errors import StorageError


def sweep(store: Store, now_s: float) -> None:
    """Remove expired files, uploads that never became files, and answers that are of no file.

    A record that cannot be read is left, with all that may be its own.

    Raises:
        StorageError: the store refused.
    """
    # In this order. A batch writes its files' records before it is closed: what was there before,
    # and is of neither an open batch nor a record now, is of none that will come.
    answers, contents, cancels = store.all_answers(), store.contents(), store.cancels()
    batches = set(store.open_batches())
    files, unreadable = store.all_files()
    batches |= set(store.open_batches())

    inputs, unclear = _inputs(store, batches)
    for key, record in files.items():
        needed = key in inputs or (record.purpose == "batch" and key.owner in unclear)
        if record.expired(now_s) and not needed:
            store.delete_file(key.owner, record)

    known = files.keys() | unreadable
    lost = [
        store.content_name(key.owner, key.id)
        for key in contents
        if key not in known and age_s(key.id, now_s) > DAY_S
    ]
    lost += [
        item.uri.removeprefix(store.root)
        for item in store.unfinished()
        if now_s - item.modified_s > DAY_S
    ]
    pieces = {piece.name for record in files.values() for piece in record.pieces}
    for key, names in answers.items():
        of_unreadable = any(
            file.owner == key.owner and is_result(file.id, key.id) for file in unreadable
        )
        if key not in batches and not of_unreadable and age_s(key.id, now_s) > DAY_S:
            lost += [name for name in names if name not in pieces]
    threaded(store.storage.delete, [store.uri(name) for name in lost])
    for key in cancels - batches:  # which came when the batch had just ended
        store.close_batch(key)


def _inputs(store: Store, batches: set[Key]) -> tuple[set[Key], set[str]]:
    """The files that batches read, and the owners of whose batches that cannot be told."""
    inputs, unclear = set(), set()
    for key in batches:
        request = readable(store.request, key)
        if isinstance(request, StorageError):
            unclear.add(key.owner)
        elif request is not None:
            inputs.add(Key(key.owner, request.input_file_id))
    return inputs, unclear
