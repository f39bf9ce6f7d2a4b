"""What every engine must do, whatever is inside it. A test module subclasses EngineContract and says how to make one:

    class TestPreview(EngineContract):
        def make(self) -> Engine:
            return PreviewEngine()

An engine without a model or network passes as it is; others are made with small or fake insides.
"""

import itertools
import threading
from pathlib import Path

import anyio
import anyio.from_thread
import anyio.lowlevel
import pytest
from PIL import Image

from inference.engines.base import Engine, Job
from inference.errors import CancelRequested, I2VError, InvalidPhoto, InvalidRequest
from inference.media.video import probe
from inference.progress.stages import Progress, StageTracker, plan
from inference.task import GenerationRequest, Video
from tests.media.hostile import many_scans


def landscape(path: Path, size: tuple[int, int] = (320, 180)) -> Path:
    """A small photo with a different colour in each corner."""
    corners = Image.new("RGB", (2, 2))
    corners.putdata([(200, 40, 40), (40, 180, 60), (40, 60, 200), (220, 210, 90)])
    corners.resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
    return path


class EngineContract:
    """Subclasses define `make`, and change a class variable where their engine cannot do what it asks."""

    request_ = GenerationRequest(prompt="slow push", duration_s=1.0, max_area_px=160 * 96, seed=1)
    unsupported_duration_s = 0.4  # seconds: shorter than any engine of ours makes
    makes_its_own_size = True  # False: a provider picks the size, whatever was asked for
    patience_s = 30.0  # a bound for one small generation; nothing waits that long

    def make(self) -> Engine:
        """A new engine."""
        raise NotImplementedError

    @pytest.fixture
    def engine(self) -> Engine:
        """A new engine for each test."""
        return self.make()

    @pytest.fixture
    def photo(self, tmp_path: Path) -> Path:
        """A valid landscape photo, outside of the lease's folder."""
        return landscape(tmp_path / "photo.jpg")

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """The lease's own folder, empty."""
        folder = tmp_path / "lease"
        folder.mkdir()
        return folder

    @pytest.fixture(params=["asyncio", "trio"])
    def anyio_backend(self, request) -> str:
        """Both event loops: the core is written for either."""
        return request.param

    def _is_real(self, video: Video, folder: Path) -> None:
        """The file is there, alone, playable at once, and as the value describes it."""
        assert list(folder.iterdir()) == [video.path]
        assert video.size_bytes == video.path.stat().st_size > 0
        info = probe(video.path)
        assert (info.width, info.height, info.frames) == (video.width, video.height, video.frames)
        assert info.fps == pytest.approx(video.fps, rel=1e-3)
        assert (info.codec, info.pix_fmt, info.faststart) == ("h264", "yuv420p", True)
        assert (info.color_range, info.color_space, info.color_primaries, info.color_trc) == ("tv", *["bt709"] * 3)

    def test_says_who_it_is(self, engine):
        """A name for logs and settings, and stages with weights that a lease's plan can hold."""
        assert engine.name == engine.name.strip().lower() != ""
        assert engine.stages
        assert all(weight > 0 for weight in engine.stages.values())
        assert sum(plan(engine.stages).values()) == pytest.approx(100)
        assert not {"download", "wait", "upload", "report", "done"} & set(engine.stages)

    @pytest.mark.anyio
    async def test_makes_the_video_it_describes(self, engine, photo, folder):
        """Width, height, rate, frames and bytes in the value are the file's own, and the length is what was asked."""
        video = await engine.generate(self.request_, {"photo": photo}, folder, Job())
        self._is_real(video, folder)
        assert video.duration_s == pytest.approx(self.request_.duration_s, abs=4 / video.fps)  # models make 4k+1

    @pytest.mark.anyio
    async def test_keeps_the_shape_of_the_photo(self, engine, tmp_path, folder):
        """A portrait stays one, and the size stays within the area that was asked for."""
        video = await engine.generate(
            self.request_, {"photo": landscape(tmp_path / "p.jpg", (180, 320))}, folder, Job()
        )
        assert video.height > video.width
        assert video.width % 2 == video.height % 2 == 0
        if self.makes_its_own_size:
            assert video.width * video.height <= self.request_.max_area_px

    @pytest.mark.anyio
    async def test_turns_a_photo_upright(self, engine, tmp_path, folder):
        """EXIF orientation counts: stored sideways, shown as a portrait."""
        sideways = tmp_path / "sideways.jpg"
        exif = Image.Exif()
        exif[0x0112] = 6
        with Image.open(landscape(tmp_path / "stored.jpg")) as image:
            image.save(sideways, exif=exif)
        video = await engine.generate(self.request_, {"photo": sideways}, folder, Job())
        assert video.height > video.width

    @pytest.mark.anyio
    async def test_leaves_the_photo_alone(self, engine, photo, folder):
        """The photo is the lease's, and may be needed for another try."""
        before = photo.read_bytes()
        await engine.generate(self.request_, {"photo": photo}, folder, Job())
        assert photo.read_bytes() == before

    @pytest.mark.anyio
    async def test_reports_its_stages_in_order_to_their_end(self, engine, photo, folder):
        """Only stages it declared, each in its turn, `done` never falling, the last one reported whole."""
        heard: list[Progress] = []
        await engine.generate(
            self.request_, {"photo": photo}, folder, Job(StageTracker(plan(engine.stages), sink=heard.append))
        )
        order = list(engine.stages)
        turns = [order.index(each.stage) for each in heard]
        assert turns == sorted(turns)
        assert turns[-1] == len(order) - 1
        assert heard[-1].done == heard[-1].total
        for before, after in itertools.pairwise(heard):
            assert after.fraction >= before.fraction
            assert after.stage != before.stage or after.done >= before.done

    @pytest.mark.anyio
    async def test_does_not_start_once_cancelled(self, engine, photo, folder):
        """A job cancelled while it waited ends with its own reason, and nothing was made."""
        job = Job()
        job.cancel(CancelRequested("cancelled in the queue"))
        with pytest.raises(CancelRequested, match="in the queue"):
            await engine.generate(self.request_, {"photo": photo}, folder, job)
        assert list(folder.iterdir()) == []

    @pytest.mark.anyio
    async def test_stops_when_its_job_is_cancelled(self, engine, photo, folder):
        """Cancelled at its first report, it raises the reason, leaves no file, and is as good as new."""
        reports = []

        def cancel(progress: Progress) -> None:
            reports.append(progress)
            job.cancel(CancelRequested("a person cancelled"))

        job = Job(StageTracker(engine.stages, sink=cancel))
        with pytest.raises(CancelRequested, match="a person"):
            await engine.generate(self.request_, {"photo": photo}, folder, job)
        assert len(reports) <= 2
        assert list(folder.iterdir()) == []
        self._is_real(await engine.generate(self.request_, {"photo": photo}, folder, Job()), folder)

    @pytest.mark.anyio
    async def test_stops_when_its_scope_is_cancelled(self, engine, photo, folder):
        """A lease that ends cancels the call from outside: it returns soon, not hung, and leaves nothing."""
        loop, home = anyio.lowlevel.current_token(), threading.get_ident()

        def cancel(_: Progress) -> None:
            if threading.get_ident() == home:  # an engine that reports from the event loop itself
                scope.cancel()
            else:
                anyio.from_thread.run_sync(scope.cancel, token=loop)

        job = Job(StageTracker(engine.stages, sink=cancel))
        with anyio.move_on_after(self.patience_s) as scope:
            await engine.generate(self.request_, {"photo": photo}, folder, job)
        assert scope.cancelled_caught
        assert not job.hung
        assert list(folder.iterdir()) == []
        self._is_real(await engine.generate(self.request_, {"photo": photo}, folder, Job()), folder)

    @pytest.mark.anyio
    async def test_stops_while_it_reads_the_photo(self, engine, photo, tmp_path, folder):
        """However long that takes: what decodes it is killed."""
        slow = tmp_path / "slow.jpg"
        slow.write_bytes(many_scans(9999, 195))
        job = Job()
        with anyio.move_on_after(0.3) as scope:
            await engine.generate(self.request_, {"photo": slow}, folder, job)
        assert scope.cancelled_caught
        assert anyio.current_time() - scope.deadline < 1
        assert not job.hung
        self._is_real(await engine.generate(self.request_, {"photo": photo}, folder, Job()), folder)

    @pytest.mark.anyio
    async def test_refuses_what_is_not_a_photo(self, engine, photo, tmp_path, folder):
        """A broken photo is InvalidPhoto, leaves nothing, and does not break the engine."""
        broken = tmp_path / "broken.jpg"
        broken.write_bytes(photo.read_bytes()[:300])
        with pytest.raises(InvalidPhoto):
            await engine.generate(self.request_, {"photo": broken}, folder, Job())
        assert list(folder.iterdir()) == []
        self._is_real(await engine.generate(self.request_, {"photo": photo}, folder, Job()), folder)

    @pytest.mark.anyio
    async def test_names_the_field_it_cannot_do(self, engine, photo, folder):
        """An unsupported length is refused before any work, by the name of its field."""
        request = self.request_.model_copy(update={"duration_s": self.unsupported_duration_s})
        with pytest.raises(InvalidRequest, match="duration_s"):
            await engine.generate(request, {"photo": photo}, folder, Job())
        assert list(folder.iterdir()) == []

    @pytest.mark.anyio
    async def test_raises_nothing_foreign(self, engine, photo, tmp_path):
        """A folder that is not there is an error of our tree too, of one line."""
        with pytest.raises(I2VError) as caught:
            await engine.generate(self.request_, {"photo": photo}, tmp_path / "missing", Job())
        assert "\n" not in str(caught.value)
