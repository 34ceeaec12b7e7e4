"""A web page on localhost, made with Gradio, on which a checkpoint answers questions about volumes."""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from nilearn.image import resample_img
from nilearn.plotting import view_img

from umbrella.base import UserError, note
from umbrella.config import Settings
from umbrella.conversations.schema import Conversation, ImageItem, questions_of
from umbrella.data.splits import read_splits
from umbrella.evaluation.candidates import find_candidates
from umbrella.evaluation.controls import blank
from umbrella.inference.cases import MIN_EFFECT, occlusion
from umbrella.inference.model import Umbrella
from umbrella.plots import BLUE, VERMILION
from umbrella.volumes.slices import grey_levels, mean_frame, voxel_spacing
from umbrella.volumes.store import VolumeStore

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import
import gradio as gr

VOXELS = 96
"""Voxels along the longest edge in the viewer. A volume with 160 took 5 s, with 96 0.6 s."""
HIDDEN = 0.2
"""Effects below this fraction of the largest one are not drawn."""
CAUTION = """**Research use only.** Not a medical device: do not use the answers for diagnosis or treatment.
Files stay on this computer; the program deletes its copies when it ends."""
BLANK_NOTE = """Blank volumes: the same questions about volumes in which all voxels have one value. An answer that is
the same there does not come from the images."""
LEGEND = f"""<p>Where the model looks, for its answer “{{}}”. <b style='color:{VERMILION}'>Red</b>: without this patch,
the answer is less likely. <b style='color:{BLUE}'>Blue</b>: it is more likely. The scale is the change of the log
likelihood in nats; changes below {HIDDEN:.0%} of the largest one are not drawn.</p>"""
EMPTY: list[Any] = [[], [], [], None, None]
"""No conversation, chats and probabilities."""


class Cohort(NamedTuple):
    """What the page takes from the data that a checkpoint was trained with."""

    subjects: Mapping[str, Sequence[ImageItem]]
    """Subjects and modalities of the test split, such as "sub-01: sMRI", to the volumes."""
    candidates: Mapping[str, Sequence[str]]
    """Question of the training split to its candidate answers."""
    questions: Sequence[str]
    """One question of each target of the training split."""


def read_cohort(settings: Settings) -> Cohort:
    """Read the cohort that a checkpoint was trained with; empty, with a note, if its files cannot be read."""
    try:
        splits = read_splits(settings, lambda items, _: items, ("train", "test"), check_files=False, dry_run=True)
    except UserError as error:
        note(f"the page has no test subjects and no candidate answers: {error}")
        return Cohort({}, {}, ())
    usual = {**find_candidates(splits.train, settings.evaluate.number_grids), **settings.evaluate.candidates}
    candidates: dict[str, list[str]] = {}
    questions: dict[str, str] = {}
    for c in questions_of(splits.train):
        if answers := c.candidates or usual.get(c.target):
            text = c.conversations[c.last_answer - 1].text
            candidates.setdefault(text, list(answers.values()))
            questions.setdefault(c.target, text)
    subjects: dict[str, Sequence[ImageItem]] = {}
    for c in sorted(splits.test, key=lambda c: (len(c.volumes), sorted(c.subjects))):
        if c.volumes and all(Path(v.image_path).is_file() for v in c.volumes):
            name = f"{' and '.join(sorted(c.subjects))}: {', '.join(v.modality for v in c.volumes)}"
            if subjects.get(name, c.volumes) != c.volumes:  # another session or run
                name += f" ({', '.join(Path(v.image_path).name for v in c.volumes)})"
            subjects[name] = c.volumes
    return Cohort(subjects, candidates, list(questions.values()))


def view_volumes(volumes: Sequence[ImageItem], store: VolumeStore, maps: Sequence[np.ndarray] = ()) -> str:
    """Make the HTML of three planes of each volume, as the model sees it, with nilearn's viewer.

    Args:
        maps: the occlusion map of each volume; all have one colour scale. Empty: none is drawn.

    Raises:
        UserError: a volume that cannot be used.
    """
    limit = max((float(np.abs(effects).max()) for effects in maps), default=0.0)
    views = []
    for i, volume in enumerate(volumes):
        array, modality = store.get(volume.image_path, volume.modality), store.modalities[volume.modality]
        spacing = voxel_spacing(modality, store.info(volume.image_path, volume.modality))
        title = f"{volume.modality}, {Path(volume.image_path).name}, {' × '.join(map(str, modality.grid))} voxels"
        effects = maps[i] if maps else np.zeros(modality.patch_grid)
        if modality.is_series:
            frame = int(np.unravel_index(np.abs(effects).argmax(), effects.shape)[3])
            first, last = frame * modality.patch[3], (frame + 1) * modality.patch[3] - 1
            title += ", mean of the frames" + (f"; effects of frames {first} to {last}" if maps else "")
            effects = effects[..., frame]
        affine = np.diag([*spacing, 1])
        grey = nib.Nifti1Image(grey_levels(mean_frame(array, modality)), affine)
        peak = (np.argwhere(np.abs(effects) == np.abs(effects).max())[0] + 0.5) * modality.patch[:3]
        centre = peak if effects.any() else np.array(grey.shape) / 2
        edge = np.multiply(grey.shape, spacing).max() / VOXELS
        with warnings.catch_warnings(action="ignore"):  # nilearn expects effects of both signs
            view = view_img(
                nib.Nifti1Image(np.kron(effects, np.ones(modality.patch[:3])).astype(np.float32), affine),
                resample_img(grey, np.diag([edge] * 3), interpolation="nearest"),
                cut_coords=tuple(centre * spacing),
                colorbar=bool(maps),
                threshold=HIDDEN * limit,
                vmax=max(limit, MIN_EFFECT),
                cmap=LinearSegmentedColormap.from_list("effect", [BLUE, "white", VERMILION]),
                black_bg=True,
                resampling_interpolation="nearest",
                opacity=0.6,
            )
        hint = "Click or drag in a plane to scroll through the others."
        views.append(f"<p>{escape(title)}. {hint}</p>{view.get_iframe('100%', 300)}")
    return "".join(views)


def make_page(umbrella: Umbrella, cohort: Cohort, title: str) -> gr.Blocks:
    """Make the page of a model, which has a ``VolumeStore``. ``title`` names the checkpoint."""
    store: Any = umbrella.collate.store

    def show(files: list[str] | None, subject: str | None, modality: str) -> list[Any]:
        try:
            volumes = umbrella.items(files, modality or None) if files else cohort.subjects.get(subject or "", [])
            return [volumes, view_volumes(volumes, store), *EMPTY]
        except UserError as error:
            message = str(error)
            for file in files or ():
                message = message.replace(f"{Path(file).parent}/", "")  # of the upload
            gr.Warning(escape(message))
            return [[], "", *EMPTY]  # no answer is about volumes other than those on the page

    @_with_messages
    def ask(question: str, own: str, volumes: list[ImageItem], dialogue: list[Conversation]) -> list[Any]:
        if not question.strip() or not volumes:
            raise UserError("type a question" if volumes else "drop a file or pick a test subject first")
        if dialogue:  # about these volumes, and about blank ones, each with its own answers
            asked = [umbrella.question((), question, turns=c.conversations) for c in dialogue]
        else:
            first = umbrella.question([v.image_path for v in volumes], question, [v.modality for v in volumes])
            asked = [first, *blank([first])]
        answers = [text.strip() for text in own.split(",") if text.strip()] or cohort.candidates.get(
            question.strip(), ()
        )
        candidates = {asked[0].target: {text: text for text in answers}}
        predictions = umbrella.predict(asked, candidates, truth=False, max_new_tokens=None)
        dialogue = [c.with_answer(p.text or "") for c, p in zip(asked, predictions, strict=True)]
        chats = [[{"role": turn.role, "content": turn.text} for turn in c.conversations] for c in dialogue]
        return [dialogue, *chats, *(dict(p.probabilities) or None for p in predictions), ""]

    @_with_messages
    def look(dialogue: list[Conversation]) -> str:
        if not dialogue:
            raise UserError("ask a question first")
        maps = occlusion(umbrella, dialogue[0], dialogue[0].answer)
        return LEGEND.format(escape(dialogue[0].answer)) + view_volumes(dialogue[0].volumes, store, maps)

    with gr.Blocks(title="UMBRELLA demo", analytics_enabled=False, fill_width=True) as page:
        volumes, dialogue = gr.State([]), gr.State([])
        gr.Markdown(f"## UMBRELLA demo\nModel: {title}")
        gr.Markdown(CAUTION, container=True)
        with gr.Row():
            with gr.Column(min_width=320):
                with gr.Row():
                    files = gr.File(label="Volumes (NIfTI, MGH)", file_count="multiple", height=140, min_width=220)
                    with gr.Column(min_width=220):
                        names = list(cohort.subjects)
                        subject = gr.Dropdown(names, value=None, label="or a test subject", visible=bool(names))
                        kinds = [("by the name of the file", ""), *((name, name) for name in umbrella.modalities)]
                        modality = gr.Dropdown(kinds, value="", label="Modality of the files", visible=len(kinds) > 2)
                look_button = gr.Button("Show where the model looks", size="sm")
                view = gr.HTML()
            with gr.Column(min_width=320):
                question = gr.Textbox(label="Question", placeholder="Ask, then follow up", submit_btn=True)
                hint = "empty: those of the training data, for its questions"
                own = gr.Textbox(label="Candidate answers, separated by commas", placeholder=hint)
                if cohort.questions:
                    gr.Examples([[text] for text in cohort.questions], question, label="Questions of the training data")
                chats, labels = [], []
                with gr.Row():
                    for name in ("These volumes", "Blank volumes"):
                        with gr.Column(min_width=240):
                            chats.append(gr.Chatbot(label=name, height=300, render_markdown=False, buttons=[]))
                            labels.append(gr.Label(label=f"Probabilities: {name.lower()}", num_top_classes=5))
                gr.Markdown(BLANK_NOTE)
                new = gr.Button("New conversation", size="sm")
        answers, inputs = [dialogue, *chats, *labels], [files, subject, modality]
        shown = [volumes, view, *answers]
        files.upload(lambda: None, None, subject).then(show, inputs, shown)
        subject.select(lambda: None, None, files).then(show, inputs, shown)
        gr.on([files.delete, files.clear, modality.select], show, inputs, shown)
        question.submit(ask, [question, own, volumes, dialogue], [*answers, question])
        look_button.click(look, dialogue, view)
        gr.on([new.click, *(chat.clear for chat in chats)], lambda: EMPTY, None, answers)
    return page


@contextmanager
def serve(settings: Settings, port: int | None = None, browser: bool = False) -> Iterator[str]:
    """Serve the page of a checkpoint on localhost, and delete uploaded files and prepared volumes at the end.

    Args:
        settings: see ``load_evaluation_settings``.
        port: None: the first free one from 7860 on.
        browser: open the page in a browser.

    Yields:
        The address of the page.

    Raises:
        UserError: as ``Umbrella.from_checkpoint``; the port is in use.
    """
    folder = Path(settings.checkpoint)
    with TemporaryDirectory(prefix="umbrella-demo-") as temporary:
        os.environ["GRADIO_TEMP_DIR"] = f"{temporary}/uploads"
        umbrella = Umbrella.from_checkpoint(folder, dtype=settings.model.dtype, store=f"{temporary}/volumes")
        page = make_page(umbrella, read_cohort(settings), f"{folder.parent.name}, {folder.name}")
        direct = filter(None, [os.environ.get("no_proxy"), "127.0.0.1"])
        os.environ["no_proxy"] = ",".join(direct)  # Gradio asks for its own page once
        try:
            _, address, _ = page.launch(
                server_name="127.0.0.1",
                server_port=port,
                inbrowser=browser,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                footer_links=[],
                css="iframe {aspect-ratio: 1.9; height: auto; min-height: 200px}",
                # Bold texts in the fonts of the default theme lack letters.
                theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            )
        except OSError:
            which = f"--port {port}: is" if port else "the ports from 7860 on: are"
            raise UserError(f"{which} in use; give another one, as in --port 9000") from None
        try:
            yield address
        finally:
            page.close(verbose=False)


def _with_messages(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose ``UserError``s are shown on the page, which else stays as it is."""

    @wraps(function)
    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except UserError as error:
            gr.Warning(escape(str(error)))
            return gr.skip()

    return call
