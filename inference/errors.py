"""Every error of this package.

    I2VError
    ├── SettingsError        HS  configuration is missing or malformed
    ├── NoTask                   somebody asked for a task, and there is none to take
    ├── PoolUnavailable          a pool of containers did not take what it was sent
    ├── LeaseLost             the task belongs to somebody else now: stop, write nothing
    ├── CancelRequested       a person cancelled the task
    ├── ListenerTooSlow          who follows progress reads slower than it happens, and is not waited for
    ├── InvalidTask           T  what the queue handed out is malformed; names the field
    ├── Refusal               a store of ours does not accept a write
    │   ├── ItemMissing          no such item
    │   ├── NotHolder            the writer does not hold the item's lease
    │   └── WrongState           the item is not in a state that allows it
    ├── QueueError
    │   ├── QueueUnavailable  R  network, 429, a gateway's 5xx; the request may have been carried out all the same
    │   │   ├── QueueUnreached R nobody listens at the queue's address, so nothing was sent
    │   │   └── QueueFailed   R  the queue itself answered 5xx: it is reachable, and did not do what was asked
    │   ├── QueueRefused         the queue rejects our request as malformed (400)
    │   └── QueueAuthError   HS  the queue rejects the key, or something in front of the queue rejects us (401)
    ├── StorageError
    │   ├── StorageUnavailable R network, 429, 5xx; an upload may have been stored all the same
    │   │   ├── StorageUnreached R no connection to the storage's host: DNS, routing or TLS failed
    │   │   └── StorageAway RHO  the queue's storage is down: the queue cannot presign, or the host cannot be reached
    │   ├── UrlExpired        R  presign again
    │   ├── ObjectExists         an object is at that path already and was not overwritten
    │   ├── ObjectMissing     T  no such object
    │   │   ├── ObjectUnsigned RT the queue presigns other paths, but not this one
    │   │   └── ObjectEmpty  RT  an object of 0 bytes
    │   ├── ObjectTooLarge    T  over a byte limit, ours or the storage's
    │   ├── StorageRefused       any other refusal
    │   │   ├── UrlMalformed  T  a URL that no client can connect to: wrong scheme, no such port
    │   │   ├── BadSignature     a token that the embedded server did not sign, or signed for another use
    │   │   ├── WrongMediaType   the embedded server does not store this media type
    │   │   └── LengthMissing    an upload to the embedded server that does not declare its length
    │   └── AddressRefused   HS  the URL leads to an address that this worker's settings do not allow
    ├── MediaError
    │   ├── InvalidPhoto      T  not a photo we can use; says why
    │   ├── InvalidVideo      T  not a video we can use; says why
    │   └── EncodeFailed         ffmpeg ended badly
    ├── MachineFault          H  no memory, no ffmpeg, a process killed from outside
    │   ├── DiskFull          H  no room left on the disk
    │   ├── NotWritable       H  a path that cannot be written at all: permissions, a read-only or failing disk
    │   └── RecordsUnavailable H the ledger cannot be read or written; nothing is paid for without it
    └── EngineError
        ├── InvalidRequest    T  outside what the engine can do; names the field
        │   └── ContentRefused T a provider's moderation refused photo or prompt; asking again can cost the account
        ├── EngineFailed      R  this attempt failed
        ├── EngineHung           no end within the hard limit of an attempt
        ├── PaymentInDoubt       a paid call was sent and its answer lost: a person decides whether to pay again
        ├── JobInDoubt           a job was sent to a platform and the answer lost: a GPU may be working on it
        ├── ProviderUnavailable HO a provider is overloaded or unreachable, also after several tries
        ├── PartsMissing      H  this machine lacks node types, models or the template that a task needs; says which
        └── EngineLost        H  the engine cannot work here any more (GPU gone)
            ├── WeightsError  H  weights are missing, damaged or not what was pinned; says what puts them there
            └── AccountError  HO a provider does not accept the key, or will not work for it now
                └── BudgetSpent HO our own limit for the day is reached

R  trying again on this machine can help (`retryable`); the other marks say what follows once all tries have failed.
H  the task is not at fault: hand the lease back instead of failing the task (`hand_back`).
S  this machine's settings are at fault, and every task would end the same way: stop the worker (`stops_worker`).
O  another service has an outage: take no tasks for a while, and longer each time (`is_outage`).
T  the task is at fault, on any machine (`task_at_fault`). Without this mark the next task may fail here as well.

Adapters map every foreign exception to one of these at their edge; nothing above them catches foreign types. Every
subclass of I2VError is defined here. Exceptions outside the tree (`Unanswered`, `OutOfRoom` and a few private ones) are
caught by the modules that use them and never reach a caller of theirs.
Messages are one line, say what to do where something can be done, and never hold a credential.
"""

import errno
import unicodedata
from typing import ClassVar


class I2VError(Exception):
    """Root of the tree."""

    retryable: ClassVar[bool] = False
    hand_back: ClassVar[bool] = False
    task_at_fault: ClassVar[bool] = False
    stops_worker: ClassVar[bool] = False
    is_outage: ClassVar[bool] = False


class SettingsError(I2VError):
    """Configuration is missing or malformed. The message has one line per problem, all problems at once."""

    hand_back = True
    stops_worker = True


class NoTask(I2VError):
    """A person asked to run a task, and none can be leased now."""


class PoolUnavailable(I2VError):
    """A pool of containers did not take a lease that was sent to it, or does not answer."""


class LeaseLost(I2VError):
    """The lease is not ours any more. Nothing may be uploaded or reported for it.

    `confirmed`: the queue said so. Otherwise the lease could not be renewed in time, and no other worker may have the
    task yet.
    """

    def __init__(self, message: str, *, confirmed: bool = True) -> None:
        super().__init__(message)
        self.confirmed = confirmed


class CancelRequested(I2VError):
    """A person cancelled the task while we held it."""


class ListenerTooSlow(I2VError):
    """Who follows a stream of progress reads more slowly than events come, and is not waited for."""


class InvalidTask(I2VError):
    """What the queue handed out is malformed.

    `item_id` is set where the payload had a usable one, so that the task can be reported failed.
    """

    task_at_fault = True

    def __init__(self, message: str, *, item_id: str | None = None) -> None:
        super().__init__(message)
        self.item_id = item_id


class Refusal(I2VError):
    """One of our own stores rejects a write; nothing was changed."""


class ItemMissing(Refusal):
    """No item with that id."""


class NotHolder(Refusal):
    """The item's lease belongs to another worker_id, or to nobody."""


class WrongState(Refusal):
    """The item's status does not allow it: nothing to cancel, nothing to retry."""


class QueueError(I2VError):
    """The queue did not do what was asked."""


class QueueUnavailable(QueueError):
    """The queue did not answer, or asks us to come later: network trouble, 429, a 5xx of a gateway in front of it.

    Whether the request was carried out is unknown.
    """

    retryable = True


class QueueUnreached(QueueUnavailable):
    """Nobody listens at the queue's address, so the request was not sent."""


class QueueFailed(QueueUnavailable):
    """The queue itself answered 5xx: it is reachable, and did not do what was asked.

    If it still answers heartbeats, the failure may concern this one task, so the call is repeated only a few times.
    """


class QueueRefused(QueueError):
    """The queue rejects our request as malformed (400), or its answer breaks the API's contract."""


class QueueAuthError(QueueError):
    """The queue, or a protection layer in front of it, does not accept our credentials (401)."""

    hand_back = True
    stops_worker = True


class StorageError(I2VError):
    """An object could not be fetched or stored."""


class StorageUnavailable(StorageError):
    """Network trouble, 429 or 5xx. An upload may have been stored all the same."""

    retryable = True


class StorageUnreached(StorageUnavailable):
    """No connection to the storage's host: it is down, or this machine has no route to it."""


class StorageAway(StorageUnavailable):
    """The queue's storage is down, or cannot be reached from this machine: other tasks would fail as well.

    Either the queue can presign neither an object that should exist nor a path that is certainly free, or the host of
    its presigned URLs cannot be reached.
    """

    hand_back = True
    is_outage = True


class UrlExpired(StorageError):
    """The presigned URL has expired; ask for a new one."""

    retryable = True


class ObjectExists(StorageError):
    """An object is stored at that path already, and was not overwritten."""


class ObjectMissing(StorageError):
    """No object at that path."""

    task_at_fault = True


class ObjectUnsigned(ObjectMissing):
    """The queue presigns other paths, but not this one. It does not say why; most likely the object is missing."""

    retryable = True


class ObjectEmpty(ObjectMissing):
    """An object of 0 bytes, or a transfer of unknown length that ended before its first byte."""

    retryable = True


class ObjectTooLarge(StorageError):
    """More bytes than a limit allows, ours or the storage's."""

    task_at_fault = True


class StorageRefused(StorageError):
    """The storage refused for a reason that a retry cannot change."""


class UrlMalformed(StorageRefused):
    """No client can connect to the URL, or to the one it redirects to: wrong scheme, no such port."""

    task_at_fault = True


class BadSignature(StorageRefused):
    """A token that the embedded server did not sign, or signed for another operation or path."""


class WrongMediaType(StorageRefused):
    """The embedded server does not store objects of this media type."""


class LengthMissing(StorageRefused):
    """An upload whose size is unknown before its body is read, because it has no Content-Length."""


class AddressRefused(StorageError):
    """The URL, or its redirect, leads to an address that this worker's settings do not allow."""

    hand_back = True
    stops_worker = True


class MediaError(I2VError):
    """A photo or video could not be read or written."""


class InvalidPhoto(MediaError):
    """The photo cannot be read, or is not one we can use."""

    task_at_fault = True


class InvalidVideo(MediaError):
    """The video cannot be read, or is not one we can use."""

    task_at_fault = True


class EncodeFailed(MediaError):
    """ffmpeg did not produce the video."""


class MachineFault(I2VError):
    """This machine cannot do the work now; another machine could."""

    hand_back = True


class DiskFull(MachineFault):
    """No room left on this machine's disk, or too little for the work to begin."""


class NotWritable(MachineFault):
    """A file or folder cannot be written, whatever room there is: permissions, a read-only or failing disk."""


class RecordsUnavailable(MachineFault):
    """The ledger cannot be read or written. Nothing is paid for without it."""


class EngineError(I2VError):
    """No video came out of the engine."""


class InvalidRequest(EngineError):
    """The request is outside what the engine can do."""

    task_at_fault = True


class ContentRefused(InvalidRequest):
    """A provider's moderation refused the photo or the prompt. It bills in full, and suspends accounts that repeat."""


class EngineFailed(EngineError):
    """This attempt failed; another one may succeed."""

    retryable = True


class EngineHung(EngineError):
    """The attempt did not end within its hard limit."""


class PaymentInDoubt(EngineError):
    """A paid call was sent, and whether it was carried out is unknown. A person decides whether to pay again."""


class JobInDoubt(EngineError):
    """A job was sent to a platform, and whether it was accepted is unknown. Sent again, it might run twice."""


class ProviderUnavailable(EngineError):
    """A provider is overloaded or unreachable, also after several tries.

    Either nothing was billed, or the paid generation continues at the provider and the task's next holder fetches it.
    """

    hand_back = True
    is_outage = True


class PartsMissing(EngineError):
    """This machine's ComfyUI lacks node types or models that a workflow needs, or has no template for photo tasks.

    Another machine may have them, and other workflows may work here.
    """

    hand_back = True


class EngineLost(EngineError):
    """The engine cannot work on this machine any more."""

    hand_back = True


class WeightsError(EngineLost):
    """Weights are missing, damaged or not what was pinned. The message names the command that puts them there."""


class AccountError(EngineLost):
    """A provider does not accept our key, our credits are used up, or a rate limit or daily cap is reached."""

    is_outage = True


class BudgetSpent(AccountError):
    """The daily budget is spent, or what is left of it is too little for this task."""


NO_ROOM_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""What the operating system says when there is no room: a full disk, a quota, a limit on the size of a file."""


def write_error(error: OSError, message: str) -> DiskFull | NotWritable:
    """`message` as DiskFull where the operating system says that there is no room, else as NotWritable."""
    return (DiskFull if error.errno in NO_ROOM_ERRNOS else NotWritable)(message)


NOT_LEGIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories of characters that control a terminal or mislead its reader: control codes such as escapes (Cc);
format characters such as those that reverse the reading direction (Cf); lone surrogates, which cannot be encoded (Cs);
line and paragraph separators (Zl, Zp)."""

JOINERS = {"\u200c", "\u200d"}
"""Format characters that are kept: Persian words and emoji of families are composed with them."""


def is_legible(character: str) -> bool:
    """Whether a character of untrusted text may be shown as it is."""
    return character in JOINERS or unicodedata.category(character) not in NOT_LEGIBLE


def legible(text: str) -> str:
    """Untrusted text made safe for terminals and logs: each character that is not legible becomes �."""
    return "".join(character if is_legible(character) else "\ufffd" for character in text)


def one_line(text: str, limit: int) -> str:
    """`text` as one line of at most `limit` legible characters, as error messages hold it.

    PostgreSQL stores neither NUL nor lone surrogates, and a terminal obeys escape sequences.
    """
    return " ".join("".join(character if is_legible(character) else " " for character in text).split())[:limit]
