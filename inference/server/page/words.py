"""What the page says, in English and Korean, and how each language writes numbers, durations, sizes and money."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

Language = Literal["en", "ko"]

LANGUAGES: tuple[Language, ...] = get_args(Language)

NAMES: Mapping[Language, str] = {"en": "English", "ko": "한국어"}
"""Each language's name in itself."""

MINUTE_S, HOUR_S, DAY_S = 60, 3600, 86_400

# A key that ends in .one has a twin in .other: how many there are decides. Korean makes no difference.
ENGLISH: Mapping[str, str] = {
    "app.name": "i2v",
    "app.heading": "Photos become short clips",
    "skip": "Skip to the clips",
    "language": "Language",
    "sign_out": "Sign out",
    # Adding photos
    "drop.title": "Drop photos here",
    "drop.anywhere": "or anywhere on this page. JPEG, PNG, WebP or HEIC, up to {size} each.",
    "drop.choose": "Choose photos",
    "drop.now": "Let go to add the photos",
    "drop.needs_script": "Adding photos here needs JavaScript. Without it: i2v submit PHOTO PROMPT",
    "form.heading": "New clips",
    "form.prompt": "What should happen?",
    "form.prompt_example": "She turns to the camera and smiles; slow dolly-in",
    "form.seconds": "Seconds",
    "form.submit.none": "Make clips",
    "form.submit.one": "Make {n} clip",
    "form.submit.other": "Make {n} clips",
    "form.no_photos": "Choose a photo first.",
    "form.chosen": "Chosen photos",
    # One photo on its way
    "upload.ready": "Ready",
    "upload.waits": "In line",
    "upload.sending": "Sending",
    "upload.checking": "Checking",
    "upload.again": "Connection lost, trying again",
    "upload.sent": "Sent",
    "upload.too_large": "Larger than {size}. Make it smaller and add it again.",
    "upload.empty": "The file is empty, or a folder that cannot be read.",
    "upload.not_photo": "Cannot be used as a photo.",
    "upload.signed_out": "You are signed out. Sign in in another tab, then try again.",
    "upload.refused": "Was not accepted.",
    "upload.unreadable": "The file cannot be read any more. Add it again.",
    "upload.retry": "Try again",
    "upload.remove": "Remove {name}",
    "upload.progress": "{name}: upload",
    # How things are
    "summary.heading": "Overview",
    "status.all": "All",
    "status.pending": "Waiting",
    "status.processing": "Running",
    "status.completed": "Done",
    "status.failed": "Failed",
    "status.cancelled": "Cancelled",
    "filter.heading": "Show by state",
    "fact.oldest": "Longest wait",
    "fact.left": "All done in",
    "fact.hour": "Clips in the last hour",
    "fact.spent": "Spent today (UTC)",
    "fact.unpriced.one": "+ {n} clip without a known price",
    "fact.unpriced.other": "+ {n} clips without a known price",
    "fact.workers": "Workers",
    "fact.none": "None",
    "workers.heard": "{time} ago",
    "workers.now": "just now",
    "workers.stale": "silent for {time}",
    "workers.idle": "idle",
    "workers.busy.one": "{n} clip",
    "workers.busy.other": "{n} clips",
    "workers.more.one": "and {n} more",
    "workers.more.other": "and {n} more",
    "workers.absent": "No worker has been heard of lately, so nothing moves. Start one with",
    # A clip
    "clip.wait": "waiting for {time}",
    "clip.stopping": "Stopping",
    "clip.progress": "{name}: progress",
    "clip.left": "{time} left",
    "clip.unknown": "—",
    "clip.time_left": "Time left",
    "clip.worker": "Worker",
    "clip.price": "Price",
    "clip.unpriced": "Price not known",
    "clip.video": "Clip of {name}",
    "clip.photo": "Photo {name}",
    "clip.no_prompt": "No prompt",
    "clip.gone": "The clip is not in storage any more. Delete this one and add the photo again.",
    "clip.took": "took {time}",
    "clip.more": "Show all",
    "clip.failed_before.one": "Failed {n} time before",
    "clip.failed_before.other": "Failed {n} times before",
    "error.retry": "Retry puts it back in line with the same photo and prompt.",
    "error.crashed": "Each worker that tried this went silent. The photo may be what stops them: try another one.",
    "error.lost": "Workers took this and were not heard of again. See whether they can reach this server with its key.",
    "error.photo": "The photo cannot be used. Delete this one and add another photo.",
    "error.refused": "The photo or the prompt was refused. Change it and add it again.",
    "action.cancel": "Cancel",
    "action.retry": "Retry",
    "action.delete": "Delete",
    "action.download": "Download",
    "action.failed": "That did not work: {reason}",
    "action.no_answer": "the server does not answer",
    "action.label": "{action}: {name}",
    "confirm.title": "Delete this?",
    "confirm.text": "The clip of {name} will be gone, and the photo as well unless it has other clips. "
    "This cannot be undone.",
    "confirm.keep": "Keep",
    # A group
    "group.clips.one": "{n} clip",
    "group.clips.other": "{n} clips",
    "group.count": "{status}: {n}",
    "group.left": "{time} left",
    "group.download": "Download all",
    "group.download.label": "Download all finished clips of this group",
    "group.show": "Only this group",
    "group.all": "All groups",
    # The list
    "list.heading": "Clips",
    "list.empty.title": "No clips yet",
    "list.empty.text": "Drop a few photos above, say what should happen in them, and press the button. "
    "Each photo becomes one clip, and plays here when it is done.",
    "list.none": "Nothing here at the moment.",
    "list.show_all": "Show all clips",
    "list.older": "Older",
    "list.newest": "Newest",
    "list.pages": "Pages",
    # Connection
    "connection.live": "Live",
    "connection.lost": "Reconnecting",
    "connection.lost_text": "No connection to the server. What you see may be old; it goes on by itself.",
    "said.completed": "{name} is done",
    "said.failed": "{name} failed",
    "said.cancelled": "{name} was cancelled",
    "said.deleted": "{name} was deleted",
    "said.added.one": "{n} photo added",
    "said.added.other": "{n} photos added",
    "title.running": "{n} running",
    "title.waiting": "{n} waiting",
    # Errors of a whole page
    "problem.title": "This page cannot be shown",
    "problem.missing": "There is nothing here (any more).",
    "problem.back": "Back to the clips",
    # Signing in
    "sign_in.title": "Sign in",
    "sign_in.key": "Key",
    "sign_in.hint": "The key that this server was started with (WORKER_API_KEY).",
    "sign_in.submit": "Sign in",
    "sign_in.wrong": "This is not the key.",
    "sign_in.pause": "Too many tries. Wait {time}, then try again.",
    # Stages that workers report
    "stage.starting": "Starting",
    "stage.download": "Fetching the photo",
    "stage.wait": "Waiting for its turn",
    "stage.prepare": "Preparing",
    "stage.queue": "In the provider's line",
    "stage.generate": "Generating",
    "stage.workflow": "Running the workflow",
    "stage.render": "Rendering",
    "stage.encode": "Reading photo and prompt",
    "stage.denoise": "Painting the frames",
    "stage.decode": "Developing the frames",
    "stage.segments": "Making the parts",
    "stage.join": "Joining the parts",
    "stage.fetch": "Fetching the clip",
    "stage.upload": "Storing the clip",
    "stage.report": "Finishing",
    # Durations
    "time.seconds": "{s} s",
    "time.minutes": "{m} min",
    "time.minutes_seconds": "{m} min {s} s",
    "time.hours": "{h} h",
    "time.hours_minutes": "{h} h {m} min",
    "time.days": "{d} d",
    "time.days_hours": "{d} d {h} h",
}

KOREAN: Mapping[str, str] = {
    "app.name": "i2v",
    "app.heading": "사진이 짧은 영상이 됩니다",
    "skip": "영상 목록으로 건너뛰기",
    "language": "언어",
    "sign_out": "로그아웃",
    "drop.title": "사진을 여기에 놓으세요",
    "drop.anywhere": "이 페이지 어디에 놓아도 됩니다. JPEG, PNG, WebP, HEIC, 한 장에 {size}까지.",
    "drop.choose": "사진 고르기",
    "drop.now": "놓으면 사진이 추가됩니다",
    "drop.needs_script": "여기서 사진을 추가하려면 JavaScript가 필요합니다. 없이 쓰려면: i2v submit PHOTO PROMPT",
    "form.heading": "새 영상",
    "form.prompt": "어떤 장면이 될까요?",
    "form.prompt_example": "카메라를 보며 환하게 웃는다, 천천히 다가가는 화면",
    "form.seconds": "길이(초)",
    "form.submit.none": "영상 만들기",
    "form.submit.one": "영상 {n}개 만들기",
    "form.submit.other": "영상 {n}개 만들기",
    "form.no_photos": "먼저 사진을 골라 주세요.",
    "form.chosen": "고른 사진",
    "upload.ready": "준비됨",
    "upload.waits": "차례 기다림",
    "upload.sending": "보내는 중",
    "upload.checking": "확인 중",
    "upload.again": "연결이 끊겨 다시 보내는 중",
    "upload.sent": "보냄",
    "upload.too_large": "{size}보다 큽니다. 크기를 줄여 다시 추가해 주세요.",
    "upload.empty": "빈 파일이거나 읽을 수 없는 폴더입니다.",
    "upload.not_photo": "사진으로 쓸 수 없는 파일입니다.",
    "upload.signed_out": "로그아웃되었습니다. 다른 탭에서 로그인한 뒤 다시 시도해 주세요.",
    "upload.refused": "받아들여지지 않았습니다.",
    "upload.unreadable": "파일을 더는 읽을 수 없습니다. 다시 추가해 주세요.",
    "upload.retry": "다시 시도",
    "upload.remove": "{name} 빼기",
    "upload.progress": "{name}: 전송",
    "summary.heading": "현황",
    "status.all": "전체",
    "status.pending": "대기",
    "status.processing": "진행 중",
    "status.completed": "완료",
    "status.failed": "실패",
    "status.cancelled": "취소됨",
    "filter.heading": "상태별로 보기",
    "fact.oldest": "가장 오래 기다린 시간",
    "fact.left": "모두 끝나기까지",
    "fact.hour": "최근 1시간 완료",
    "fact.spent": "오늘 쓴 돈(UTC)",
    "fact.unpriced.one": "+ 가격을 모르는 영상 {n}개",
    "fact.unpriced.other": "+ 가격을 모르는 영상 {n}개",
    "fact.workers": "워커",
    "fact.none": "없음",
    "workers.heard": "{time} 전",
    "workers.now": "방금",
    "workers.stale": "{time}째 소식 없음",
    "workers.idle": "쉬는 중",
    "workers.busy.one": "영상 {n}개",
    "workers.busy.other": "영상 {n}개",
    "workers.more.one": "외 {n}대",
    "workers.more.other": "외 {n}대",
    "workers.absent": "최근에 소식을 보낸 워커가 없어 멈춰 있습니다. 이렇게 시작하세요:",
    "clip.wait": "{time}째 기다리는 중",
    "clip.stopping": "멈추는 중",
    "clip.progress": "{name}: 진행률",
    "clip.left": "{time} 남음",
    "clip.unknown": "—",
    "clip.time_left": "남은 시간",
    "clip.worker": "워커",
    "clip.price": "가격",
    "clip.unpriced": "가격을 알 수 없음",
    "clip.video": "{name} 영상",
    "clip.photo": "{name} 사진",
    "clip.no_prompt": "설명 없음",
    "clip.gone": "저장소에 영상이 더는 없습니다. 이 항목을 지우고 사진을 다시 추가해 주세요.",
    "clip.took": "{time} 걸림",
    "clip.more": "모두 보기",
    "clip.failed_before.one": "앞서 {n}번 실패",
    "clip.failed_before.other": "앞서 {n}번 실패",
    "error.retry": "다시 시도하면 같은 사진과 설명으로 줄에 다시 섭니다.",
    "error.crashed": "이 작업을 맡은 워커마다 소식이 끊겼습니다. 사진 때문일 수 있으니 다른 사진으로 해 보세요.",
    "error.lost": "워커가 맡은 뒤 소식이 없었습니다. 워커가 키를 가지고 이 서버에 닿을 수 있는지 확인해 주세요.",
    "error.photo": "쓸 수 없는 사진입니다. 이 항목을 지우고 다른 사진을 추가해 주세요.",
    "error.refused": "사진이나 설명이 거절되었습니다. 바꿔서 다시 추가해 주세요.",
    "action.cancel": "취소",
    "action.retry": "다시 시도",
    "action.delete": "삭제",
    "action.download": "내려받기",
    "action.failed": "처리하지 못했습니다: {reason}",
    "action.no_answer": "서버가 답하지 않습니다",
    "action.label": "{action}: {name}",
    "confirm.title": "삭제할까요?",
    "confirm.text": "{name} 영상이 지워집니다. 이 사진으로 만든 다른 영상이 없으면 사진도 지워집니다. "
    "되돌릴 수 없습니다.",
    "confirm.keep": "그대로 두기",
    "group.clips.one": "영상 {n}개",
    "group.clips.other": "영상 {n}개",
    "group.count": "{status} {n}",
    "group.left": "{time} 남음",
    "group.download": "모두 내려받기",
    "group.download.label": "이 묶음에서 완성된 영상 모두 내려받기",
    "group.show": "이 묶음만 보기",
    "group.all": "모든 묶음",
    "list.heading": "영상",
    "list.empty.title": "아직 영상이 없습니다",
    "list.empty.text": "위에 사진을 몇 장 놓고, 어떤 장면이 될지 적은 다음 버튼을 누르세요. "
    "사진 한 장이 영상 하나가 되고, 다 되면 여기서 바로 볼 수 있습니다.",
    "list.none": "지금은 아무것도 없습니다.",
    "list.show_all": "모든 영상 보기",
    "list.older": "이전 영상",
    "list.newest": "최신 영상",
    "list.pages": "페이지",
    "connection.live": "실시간",
    "connection.lost": "다시 연결하는 중",
    "connection.lost_text": "서버와 연결이 끊겼습니다. 보이는 내용이 오래되었을 수 있으며, 연결되면 저절로 이어집니다.",
    "said.completed": "{name} 완료",
    "said.failed": "{name} 실패",
    "said.cancelled": "{name} 취소됨",
    "said.deleted": "{name} 삭제됨",
    "said.added.one": "사진 {n}장 추가됨",
    "said.added.other": "사진 {n}장 추가됨",
    "title.running": "{n}개 진행 중",
    "title.waiting": "{n}개 대기",
    "problem.title": "이 페이지를 보여 줄 수 없습니다",
    "problem.missing": "여기에는 (이제) 아무것도 없습니다.",
    "problem.back": "영상 목록으로 돌아가기",
    "sign_in.title": "로그인",
    "sign_in.key": "키",
    "sign_in.hint": "이 서버를 시작할 때 정한 키입니다(WORKER_API_KEY).",
    "sign_in.submit": "로그인",
    "sign_in.wrong": "맞는 키가 아닙니다.",
    "sign_in.pause": "너무 많이 시도했습니다. {time} 뒤에 다시 시도해 주세요.",
    "stage.starting": "시작하는 중",
    "stage.download": "사진 가져오는 중",
    "stage.wait": "차례를 기다리는 중",
    "stage.prepare": "준비하는 중",
    "stage.queue": "제공자 대기열에 있음",
    "stage.generate": "영상 만드는 중",
    "stage.workflow": "워크플로 실행 중",
    "stage.render": "그리는 중",
    "stage.encode": "사진과 설명 읽는 중",
    "stage.denoise": "장면 그리는 중",
    "stage.decode": "장면 현상하는 중",
    "stage.segments": "조각 만드는 중",
    "stage.join": "조각 잇는 중",
    "stage.fetch": "영상 가져오는 중",
    "stage.upload": "영상 저장하는 중",
    "stage.report": "마무리하는 중",
    "time.seconds": "{s}초",
    "time.minutes": "{m}분",
    "time.minutes_seconds": "{m}분 {s}초",
    "time.hours": "{h}시간",
    "time.hours_minutes": "{h}시간 {m}분",
    "time.days": "{d}일",
    "time.days_hours": "{d}일 {h}시간",
}

TABLES: Mapping[Language, Mapping[str, str]] = {"en": ENGLISH, "ko": KOREAN}

FOR_SCRIPT = (
    "time.",
    "stage.",
    "upload.",
    "form.submit.",
    "said.",
    "title.",
    "clip.",
    "action.",
    "confirm.",
    "form.no",
)
"""How the keys begin that the page's script needs, too."""


class Words:
    """One language."""

    def __init__(self, language: Language) -> None:
        self.language = language
        self._table = TABLES[language]

    def __call__(self, key: str, **values: object) -> str:
        """The text of a key, its gaps filled. Raises KeyError for a key or a value that is missing."""
        return self._table[key].format(**values)

    def count(self, key: str, n: int) -> str:
        """The text for so many, such as "1 clip" and "2 clips"."""
        return self(f"{key}.{'one' if n == 1 else 'other'}", n=self.number(n))

    def number(self, n: float) -> str:
        """A whole number, its thousands apart: both languages use commas."""
        return f"{n:,.0f}"

    def stage(self, stage: str | None) -> str:
        """A stage that is known by its name here, or else as the worker calls it."""
        return self._table.get(f"stage.{stage or 'starting'}", stage or "")

    def duration(self, seconds: float) -> str:
        """As people say it, by its two largest units at most: "45 s", "3 min", "2 h 10 min"."""
        whole = max(0, round(seconds))
        if whole < MINUTE_S:
            return self("time.seconds", s=whole)
        if whole < HOUR_S:
            minutes, rest_s = divmod(whole, MINUTE_S)
            exact = minutes < 10 and rest_s  # seconds matter less the longer it takes
            return self(f"time.minutes{'_seconds' * bool(exact)}", m=minutes, s=rest_s)
        if whole < DAY_S:
            hours, minutes = divmod(whole // MINUTE_S, 60)
            return self(f"time.hours{'_minutes' * bool(minutes)}", h=hours, m=minutes)
        days, hours = divmod(whole // HOUR_S, 24)
        return self(f"time.days{'_hours' * bool(hours)}", d=self.number(days), h=hours)

    def seconds(self, seconds: float) -> str:
        """The length of a clip: "5 s", "2.5 s"."""
        return self("time.seconds", s=f"{seconds:.1f}".removesuffix(".0"))

    def size(self, size_bytes: int) -> str:
        """In decimal units, as file managers show it: "850 KB", "3.2 MB"."""
        if size_bytes < 1_000_000:
            return f"{max(1, round(size_bytes / 1000))} KB"
        if size_bytes < 1_000_000_000:
            mb = size_bytes / 1_000_000
            return f"{mb:.0f} MB" if mb >= 99.95 else f"{mb:.1f} MB"
        return f"{size_bytes / 1_000_000_000:.1f} GB"

    def limit(self, size_bytes: int) -> str:
        """A limit, rounded down so that whatever keeps to it is accepted: "50 MB"."""
        return f"{size_bytes // 1_000_000} MB" if size_bytes >= 1_000_000 else f"{size_bytes // 1000} KB"

    def money(self, usd: float) -> str:
        """Dollars; parts of a cent only where there is nothing else."""
        return f"${usd:.4f}" if 0 < usd < 0.01 else f"${usd:,.2f}"

    def for_script(self) -> dict[str, Any]:
        """The texts that the page's script needs."""
        return {key: text for key, text in self._table.items() if key.startswith(FOR_SCRIPT)}


WORDS: Mapping[Language, Words] = {language: Words(language) for language in LANGUAGES}


def language_of(*, asked: str | None, remembered: str | None, accepted: str | None) -> Language:
    """The language to answer in: the one that the address asks for, else the cookie's, else what the browser wants.

    `accepted`: an Accept-Language header (RFC 9110, 12.5.4).
    """
    for language in LANGUAGES:
        if asked == language:
            return language
    for language in LANGUAGES:
        if remembered == language:
            return language
    best: tuple[float, Language] = (0.0, "en")
    for wanted, quality in _accepted(accepted or ""):
        for language in LANGUAGES:
            if wanted.partition("-")[0] == language and quality > best[0]:
                best = (quality, language)
    return best[1]


def _accepted(header: str) -> Iterable[tuple[str, float]]:
    for part in header.lower().split(",")[:20]:
        name, _, parameters = part.partition(";")
        quality = parameters.strip().removeprefix("q=") or "1"
        try:
            yield name.strip(), float(quality)
        except ValueError:
            continue
