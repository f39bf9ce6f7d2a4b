"""Every error of this package.

    I2VError
    ├── SettingsError        HS  configuration is missing or malformed
    ├── NoTask                   somebody asked for a task, and there is none to take
    ├── PoolUnavailable          a pool of containers did not take what it was sent
    ├── LeaseLost             the task belongs to somebody else now: stop, write nothing
    ├── CancelRequested       a person cancelled the task
    ├── InvalidTask           T  what the queue handed out is malformed; names the field
    ├── Refusal               a store of ours does not accept a write
    │   ├── ItemMissing          no such item
    │   ├── NotHolder            the writer does not hold the item's lease
    │   └── WrongState           the item is not in a state that allows it
    ├── QueueError
    │   ├── QueueUnavailable  R  network, 429, a gateway's 5xx; it may have been carried out all the same
    │   │   └── QueueFailed   R  the queue itself answered 5xx: it is there, and did not do it
    │   ├── QueueRefused         the queue calls our request wrong (400)
    │   └── QueueAuthError   HS  the queue does not accept the key, or does not let us near it (401)
    ├── StorageError
    │   ├── StorageUnavailable R network, 429, 5xx; an upload may have been stored all the same
    │   │   ├── StorageUnreached R nobody was met at its address: no name, no route, no TLS
    │   │   └── StorageAway RHO  the queue's storage does not work: nothing is presigned, or nobody is met there
    │   ├── UrlExpired        R  presign again
    │   ├── ObjectExists         something is at that path already and was not overwritten
    │   ├── ObjectMissing     T  no such object
    │   │   ├── ObjectUnsigned RT the queue presigns others, and not this one
    │   │   └── ObjectEmpty  RT  an object of 0 bytes
    │   ├── ObjectTooLarge    T  over a byte limit, ours or the storage's
    │   ├── StorageRefused       any other refusal: signature, media type
    │   │   └── UrlMalformed  T  a URL that nobody can follow: another scheme, no such port
    │   └── AddressRefused   HS  the URL leads where this worker's settings do not let it go
    ├── MediaError
    │   ├── InvalidPhoto      T  not a photo we can use; says why
    │   └── EncodeFailed         ffmpeg ended badly
    ├── MachineFault          H  no memory, no ffmpeg, a process killed from outside
    │   ├── DiskFull          H  no room for temporary files
    │   └── RecordsUnavailable H the ledger cannot be read or written; nothing is paid for without it
    └── EngineError
        ├── InvalidRequest    T  outside what the engine can do; names the field
        │   └── ContentRefused T a provider's moderation refused photo or prompt; asking again can cost the account
        ├── EngineFailed      R  this attempt failed
        ├── EngineHung           no end within the hard limit of an attempt
        ├── PaymentInDoubt       a paid call was sent and its answer lost: it is not sent again unasked
        ├── ProviderUnavailable HO a provider sheds load or answers nothing, however often it was asked
        └── EngineLost        H  the engine cannot work here any more (GPU gone)
            ├── WeightsError  H  weights are missing, damaged or not what was pinned; says what puts them there
            └── AccountError  HO a provider does not accept the key, or will not work for it now
                └── BudgetSpent HO our own limit for the day is reached

R  another try here can help (`retryable`); the other marks say what follows when all tries are spent.
H  the task is not at fault: hand the lease back instead of failing the task (`hand_back`).
S  this machine's settings are, so the next task would end the same way: take no more of them (`stops_worker`).
O  somebody else has an outage: take no more tasks for a while, and longer each time (`is_outage`).
T  the task is at fault, on any machine (`task_at_fault`). Without it the next task may fail here just so.

Adapters map every foreign exception to one of these at their edge; nothing above them catches foreign types.
Messages are one line, say what to do where something can be done, and never hold a credential.
"""

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
    """Somebody asked for a task by hand, and there is none that can be taken now."""


class PoolUnavailable(I2VError):
    """A pool of containers did not take a lease that was sent to it, or does not answer."""


class LeaseLost(I2VError):
    """The lease is not ours any more. Nothing may be uploaded or reported for it.

    `confirmed`: the queue said so. Otherwise it could not be renewed in time, and may still be nobody else's.
    """

    def __init__(self, message: str, *, confirmed: bool = True) -> None:
        super().__init__(message)
        self.confirmed = confirmed


class CancelRequested(I2VError):
    """A person cancelled the task while we held it."""


class InvalidTask(I2VError):
    """What the queue handed out is malformed.

    `item_id` is set where the payload had a usable one, so that the task can be reported failed.
    """

    task_at_fault = True

    def __init__(self, message: str, *, item_id: str | None = None) -> None:
        super().__init__(message)
        self.item_id = item_id


class Refusal(I2VError):
    """A store of ours does not accept a write; nothing was changed."""


class ItemMissing(Refusal):
    """No item with that id."""


class NotHolder(Refusal):
    """The item's lease belongs to another worker_id, or to nobody."""


class WrongState(Refusal):
    """The item's status does not allow it: nothing to cancel, nothing to retry."""


class QueueError(I2VError):
    """The queue did not do what was asked."""


class QueueUnavailable(QueueError):
    """The queue gave no answer of its own, or says to come later: network trouble, 429, a 5xx of a gateway before it.

    Whether the request was carried out is unknown.
    """

    retryable = True


class QueueFailed(QueueUnavailable):
    """The queue itself answered 5xx: it is there, and did not do what was asked.

    While it answers heartbeats, that may be about this one task, so it is tried a few times and not for minutes.
    """


class QueueRefused(QueueError):
    """The queue calls our request malformed (400), or answered outside its contract."""


class QueueAuthError(QueueError):
    """The queue does not accept the key, or something before it lets nobody through (401)."""

    hand_back = True
    stops_worker = True


class StorageError(I2VError):
    """An object could not be fetched or stored."""


class StorageUnavailable(StorageError):
    """Network trouble, 429 or 5xx. An upload may have been stored all the same."""

    retryable = True


class StorageUnreached(StorageUnavailable):
    """No connection came about with whoever an address belongs to: it is away, or this machine has no way to it."""


class StorageAway(StorageUnavailable):
    """The queue's storage does not work, or not from here: no task would fare better.

    The queue can presign neither what should be there nor a path where nothing can be, or nobody is met where its URLs
    lead.
    """

    hand_back = True
    is_outage = True


class UrlExpired(StorageError):
    """The presigned URL is past its time; ask for a new one."""

    retryable = True


class ObjectExists(StorageError):
    """Something is stored at that path already, and was not overwritten."""


class ObjectMissing(StorageError):
    """No object at that path."""

    task_at_fault = True


class ObjectUnsigned(ObjectMissing):
    """The queue presigns other paths, and not this one. It does not say why; most likely nothing is there."""

    retryable = True


class ObjectEmpty(ObjectMissing):
    """An object of 0 bytes, or a transfer of unknown length that ended before its first byte."""

    retryable = True


class ObjectTooLarge(StorageError):
    """More bytes than a limit allows, ours or the storage's."""

    task_at_fault = True


class StorageRefused(StorageError):
    """The storage refused for a reason that repeating cannot cure."""


class UrlMalformed(StorageRefused):
    """The URL, or the one a redirect leads to, is none that anybody can connect to: another scheme, no such port."""

    task_at_fault = True


class AddressRefused(StorageError):
    """The URL, or a redirect of it, leads to an address that this worker's settings do not let it visit."""

    hand_back = True
    stops_worker = True


class MediaError(I2VError):
    """A photo or video could not be read or written."""


class InvalidPhoto(MediaError):
    """Not a photo we can use."""

    task_at_fault = True


class EncodeFailed(MediaError):
    """ffmpeg did not produce the video."""


class MachineFault(I2VError):
    """This machine cannot do it now; another could."""

    hand_back = True


class DiskFull(MachineFault):
    """No room left for temporary files on this machine."""


class RecordsUnavailable(MachineFault):
    """The ledger cannot be read or written here. Nothing is paid for without it."""


class EngineError(I2VError):
    """No video came out of the engine."""


class InvalidRequest(EngineError):
    """The request is outside what the engine can do."""

    task_at_fault = True


class ContentRefused(InvalidRequest):
    """A provider's moderation refused the photo or the prompt. Billed in full; repeats suspend the account."""


class EngineFailed(EngineError):
    """This attempt failed; another may not."""

    retryable = True


class EngineHung(EngineError):
    """The attempt did not end within its hard limit."""


class PaymentInDoubt(EngineError):
    """A paid call was sent, and whether it was carried out is unknown. A person decides whether to pay again."""


class ProviderUnavailable(EngineError):
    """A provider sheds load or cannot be reached, and was asked more than once.

    Nothing was billed, or what was paid for goes on there: whoever gets the task next goes on with it.
    """

    hand_back = True
    is_outage = True


class EngineLost(EngineError):
    """The engine cannot work on this machine any more."""

    hand_back = True


class WeightsError(EngineLost):
    """Weights are missing, damaged or not what was pinned. The message names the command that puts them there."""


class AccountError(EngineLost):
    """A provider does not accept our key, has no credits of ours, or has had enough of us for today."""

    is_outage = True


class BudgetSpent(AccountError):
    """What may be spent in one day is spent, or the rest is too little for this task."""


NOT_LEGIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories of characters that steer a terminal or mislead its reader: control codes, such as escapes (Cc);
format characters, such as marks that turn the direction of reading (Cf); lone surrogates, which cannot be encoded
(Cs); line and paragraph separators (Zl, Zp)."""

JOINERS = {"\u200c", "\u200d"}
"""Format characters that stay all the same: Persian words and emoji of families are put together with them."""


def is_legible(character: str) -> bool:
    """Whether a character of a stranger's text may be shown as it is."""
    return character in JOINERS or unicodedata.category(character) not in NOT_LEGIBLE


def legible(text: str) -> str:
    """Text of strangers as terminals and logs may show it: each character that is not legible becomes �."""
    return "".join(character if is_legible(character) else "\ufffd" for character in text)


def one_line(text: str, limit: int) -> str:
    """`text` as a message holds it: one line of at most `limit` characters, all legible.

    PostgreSQL takes neither NUL nor lone surrogates, and a terminal takes escapes for orders.
    """
    return " ".join("".join(character if is_legible(character) else " " for character in text).split())[:limit]
