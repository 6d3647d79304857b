"""A tab's view of its conversation. Text of people and models is put into elements as text, never as HTML."""

from collections.abc import Awaitable, Mapping
from pathlib import Path
from typing import Any

from nicegui import events, ui
from nicegui.elements.mixins.text_element import TextElement

from recipes.page import saving
from recipes.page.conversation import STOPPED, Branch, Conversation, Passage, Refused, Turn, sections_of, turns_after
from recipes.page.elements import button, plain, visible
from recipes.page.saving import ADDED, KEPT, REMOVED, EditFiles
from recipes.page.searching import OwnDocuments, SearchArea
from recipes.page.writing import Writer
from recipes.report import markup
from rollout.guidance.clients import GeneratorFailed
from rollout.guidance.edits import EditRefused

STYLE = markup.STYLE + Path(__file__).with_name("style.css").read_text(encoding="utf-8")
REFRESH_SECONDS = 0.1
PREVIEW_SECONDS = 0.3
# A diff that begins with kept text shows only this many characters of its end.
KEPT_SHOWN = 120
TAGS = {KEPT: "span", REMOVED: "del", ADDED: "ins"}
THINKING, ANSWER = "thinking", "answer"
TITLES = {THINKING: "Thinking", ANSWER: "Answer"}

# The model continues from the text before the cursor.
ON_ENTER = """(event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  emit(event.target.value);
}"""
ON_KEY = """(event) => {
  const before = event.target.value.slice(0, event.target.selectionStart);
  if (event.key === "Escape") emit("cancel", before);
  if (event.key === "Enter" && event.ctrlKey) { event.preventDefault(); emit("continue", before); }
}"""
BEFORE_CURSOR = """(event) => {
  if (event.target.localName === "textarea") emit(event.target.value.slice(0, event.target.selectionStart));
}"""
ON_CONTINUE = """() => {
  const box = document.querySelector(".edit-box textarea");
  emit("continue", box.value.slice(0, box.selectionStart));
}"""
TO_BOX = """const box = document.querySelector(".edit-box textarea");
box.focus();
box.setSelectionRange(box.value.length, box.value.length);"""
TO_MESSAGE = """document.querySelector(".message textarea").focus();
window.scrollTo(0, document.body.scrollHeight);"""


class Area:
    """The thinking or the answer of a branch, with one element for each passage. It grows with the answer."""

    def __init__(self, part: str) -> None:
        self.part = ui.element("div")
        with self.part:
            plain(TITLES[part], "h4")
            self.box = ui.element("div").classes(f"text {part}")
        self.shown: list[TextElement] = []

    def fill(self, passages: list[tuple[str, Passage]]) -> None:
        """Show these texts, each with its passage. Elements whose text has not changed stay as they are."""
        self.part.set_visibility(bool(passages))
        for (text, _), element in zip(passages, self.shown, strict=False):
            shown = visible(text)
            if element.text != shown:
                element.text = shown
        with self.box:
            for text, passage in passages[len(self.shown) :]:
                self.shown.append(passage_element(text, passage))
        # These elements showed the beginning of a thinking mark as text.
        for element in self.shown[len(passages) :]:
            element.text = ""


def passage_element(text: str, passage: Passage) -> TextElement:
    """An element with a passage, underlined by its value."""
    element = plain(text, "span", f"passage {passage.origin}")
    if passage.values:
        values = passage.values
        level = sum(values.values()) / len(values) if passage.score is None else passage.score
        numbers = " · ".join(f"{name} {value:.2f}" for name, value in values.items())
        element.classes("valued").style(f"--level:{min(max(level, 0.0), 1.0):.3f}")
        element.props["data-values"] = numbers
        element.props["title"] = numbers
    return element


def within(branch: Branch, section: tuple[int, int] | None) -> list[tuple[str, Passage]]:
    """The parts of the passages within a section of the branch's text, each with its passage."""
    if section is None:
        return []
    start, end = section
    parts = []
    place = 0
    for passage in branch.passages:
        text = passage.text[max(start - place, 0) : max(end - place, 0)]
        place += len(passage.text)
        if text:
            parts.append((text, passage))
    return parts


class View:
    """One client's view of a conversation. It shows changes ten times a second."""

    def __init__(self, writer: Writer, conversation: Conversation, edits: EditFiles) -> None:
        self.writer = writer
        self.conversation = conversation
        self.edits = edits
        self.marks = writer.guidance.thinking_marks
        self.version = -1
        self.shown: list[tuple[Turn, ui.element]] = []
        # The answer that the conversation ends with, which may grow.
        self.last: tuple[Turn, Branch, Mapping[str, Area], SearchArea | None] | None = None
        # The place of a turn, the number of an answer to it, and the part that is edited.
        self.editing: tuple[int, int, str] | None = None

    def build(self) -> None:
        """Make the page's elements in the current client."""
        self.page = ui.element("main")
        with self.page:
            with ui.element("header").classes("head"):
                plain("SafeWork", "h1")
                plain(self.writer.model.rstrip("/").rpartition("/")[2], "span", "chip")
                name = ui.input("Your name", value=self.conversation.person, on_change=self._name).classes("name")
                name.props(f"dense maxlength={saving.LONGEST_NAME}")
                if self.writer.guide is not None:
                    ui.checkbox("Numbers", on_change=self._numbers).props("dense")
                if self.writer.deliberator is not None:
                    searches = self.conversation.searches
                    ui.checkbox("Deliberate search", value=searches, on_change=self._search).props("dense")
                ui.link("New conversation", "/", new_tab=True)
            self.documents = None
            if self.writer.deliberator is not None:
                self.documents = OwnDocuments(self.writer.library, self.conversation.session, self._tell)
            self.body = ui.element("div").props('role=log aria-label="Conversation"')
            with ui.element("div").classes("composer"):
                self.message = ui.textarea("Message").classes("message").props("autogrow outlined dense autofocus")
                self.message.props(f"maxlength={self.writer.page.max_characters}")
                self.message.on("keydown", lambda event: self._send(str(event.args)), js_handler=ON_ENTER)
                self.send = button("Send", lambda: self._send(self.message.value or ""))
                self.stop = button("Stop", self._stop)
        self.page.on("keydown.escape", self._stop)
        ui.timer(REFRESH_SECONDS, self.refresh)

    def refresh(self) -> None:
        """Show what has changed since the last time."""
        conversation = self.conversation
        if self.documents is not None:
            self.documents.refresh()
        # An open edit stays as it is until the model goes on from it.
        if self.version != conversation.version and self.editing is None:
            self.version = conversation.version
            self._build_turns()
            self._occupy(conversation.is_busy)
            self.send.set_visibility(not conversation.is_busy)
            self.stop.set_visibility(conversation.is_busy)
        elif conversation.is_busy:
            self._fill()

    def _occupy(self, is_occupied: bool) -> None:
        """Hide the buttons that change answers while one is written or edited."""
        self.page.classes(**({"add": "occupied"} if is_occupied else {"remove": "occupied"}))

    def _build_turns(self) -> None:
        """Show the turns. Only new turns are built, and the last turn that is already shown is rebuilt."""
        turns = self.conversation.turns
        same = 0
        while same < min(len(turns), len(self.shown)) and turns[same] is self.shown[same][0]:
            same += 1
        for _, element in self.shown[same:]:
            element.delete()
        del self.shown[same:]
        for turn in turns[same:]:
            with self.body:
                self.shown.append((turn, ui.element("section").classes("talk")))
        for place in range(max(same - 1, 0), len(turns)):
            self._build_turn(place)

    def _build_turn(self, place: int) -> None:
        turn, element = self.shown[place]
        element.clear()
        with element:
            plain("You", "h2")
            plain(turn.message, classes="text said")
            with ui.element("div").classes("answers"):
                for number, branch in enumerate(turn.branches):
                    with ui.element("article").classes("card branch"):
                        self._build_branch(place, number, branch)

    def _build_branch(self, place: int, number: int, branch: Branch) -> None:
        turn = self.shown[place][0]
        with ui.element("div").classes("head"):
            plain(f"Answer {number + 1}", "h3")
            if branch.parent is not None:
                plain(f"edited from answer {branch.parent + 1}", "span", "chip")
            if len(turn.branches) > 1 and number == turn.chosen:
                plain("the conversation goes on from here", "span", "chip changed")
            if branch.finish_reason not in (None, "stop"):
                plain({"length": "cut at the longest length"}.get(branch.finish_reason, STOPPED), "span", "chip")
            if branch.is_saved:
                plain("saved", "span", "chip")
        if branch.notice is not None:
            plain(branch.notice, classes="notice").props("role=alert")
        search = None if branch.deliberation is None else SearchArea(branch.deliberation)
        areas: dict[str, Area] = {}
        for part in TITLES:
            if self.editing == (place, number, part):
                self._build_edit(turn, branch, part)
            else:
                areas[part] = Area(part)
        self._fill_branch(turn, branch, areas)
        if search is not None:
            search.conclude()
        if branch.verdicts:
            with ui.element("div").classes("head"):
                for name, verdict in branch.verdicts.items():
                    plain(f"{name}: {verdict.label} {verdict.score:.2f}", "span", "chip")
        if number == turn.chosen and place == len(self.shown) - 1:
            self.last = (turn, branch, areas, search)
        with ui.element("div").classes("head choices"):
            sections = sections_of(turn, branch, self.marks)
            # The model can't continue from the answer of a vote.
            if search is None:
                if sections.thinking is not None:
                    button("Edit thinking", lambda: self._edit(place, number, THINKING))
                if sections.answer is not None:
                    button("Edit answer", lambda: self._edit(place, number, ANSWER))
                if branch.finish_reason == STOPPED and branch.following is None:
                    button("Let it go on", lambda: self._tried(self.writer.go_on(self.conversation, place, number)))
            if number != turn.chosen:
                button("Go on from this answer", lambda: self._choose(place, number))
            if branch.parent is not None and branch.finish_reason == "stop" and not branch.is_saved:
                button("Save edit", lambda: self._save(place, branch))
        if number != turn.chosen:
            self._build_later(turns_after(branch))

    def _build_later(self, turns: list[Turn]) -> None:
        """Show, folded, the messages that follow an answer from which the conversation does not go on."""
        if not turns:
            return
        with ui.element("details"):
            plain(f"{len(turns)} later message{'s' if len(turns) > 1 else ''} in this branch", "summary")
            for turn in turns:
                plain("You", "h4")
                plain(turn.message, classes="text said")
                self._fill_branch(turn, turn.answer, {part: Area(part) for part in TITLES})

    def _build_edit(self, turn: Turn, branch: Branch, part: str) -> None:
        """Show the box in which a part is edited, and what the edit changes."""
        section = self._section(turn, branch, part)
        with ui.element("div") as around:
            box = ui.textarea(f"Edit the {part}", value=branch.text[slice(*section)]).classes("edit-box")
            box.props(f"autogrow outlined maxlength={self.writer.page.max_characters}")
        around.on("keydown", lambda event: self._on_edit(*event.args), js_handler=ON_KEY)
        for name in ("input", "keyup", "click"):
            around.on(
                name, lambda event: self._preview(str(event.args)), throttle=PREVIEW_SECONDS, js_handler=BEFORE_CURSOR
            )
        plain("What stands after the cursor is dropped, and the model goes on from there.", classes="soft")
        plain("What changes", "h4")
        self.changes = ui.element("div").classes("text diff").props("role=status")
        with ui.element("div").classes("head"):
            button("Continue from here (Ctrl+Enter)", lambda: None).on(
                "click", lambda event: self._on_edit(*event.args), js_handler=ON_CONTINUE
            )
            button("Cancel (Esc)", lambda: self._on_edit("cancel", ""))
        self._preview(branch.text[slice(*section)])
        self.page.client.run_javascript(TO_BOX)

    def _section(self, turn: Turn, branch: Branch, part: str) -> tuple[int, int]:
        """The start and end of a part that can be edited in the branch's text."""
        sections = sections_of(turn, branch, self.marks)
        section = sections.thinking if part == THINKING else sections.answer
        assert section is not None  # there is no button otherwise
        return section

    def _edited(self, before_cursor: str) -> tuple[Branch, str]:
        """The branch that is edited, and the text that the model continues from."""
        assert self.editing is not None
        place, number, part = self.editing
        turn = self.shown[place][0]
        branch = turn.branches[number]
        section = self._section(turn, branch, part)
        return branch, branch.text[: section[0]] + before_cursor

    def _preview(self, before_cursor: str) -> None:
        if self.editing is None:
            return
        branch, edited = self._edited(before_cursor)
        self.changes.clear()
        with self.changes:
            if len(edited) > self.writer.page.max_characters:
                plain("too long", "span", "notice")
                return
            for place, (kind, text) in enumerate(saving.diff(branch.text, edited)):
                is_long = place == 0 and kind == KEPT and len(text) > KEPT_SHOWN
                plain(f"…{text[-KEPT_SHOWN:]}" if is_long else text, TAGS[kind])

    async def _on_edit(self, action: str, before_cursor: str) -> None:
        """Continue from an edit, or cancel it."""
        if self.editing is None:
            return
        if action == "continue":
            _, edited = self._edited(before_cursor)
            place, number, _ = self.editing
            if not await self._tried(self.writer.continue_from(self.conversation, place, number, edited)):
                return
        self._close_edit()
        self.refresh()
        self.page.client.run_javascript(TO_MESSAGE)

    def _edit(self, place: int, number: int, part: str) -> None:
        if not self.conversation.is_busy and self.editing is None:
            self.editing = (place, number, part)
            self._occupy(True)
            self._build_turn(place)

    def _close_edit(self) -> None:
        if self.editing is not None:
            place = self.editing[0]
            self.editing = None
            self._occupy(self.conversation.is_busy)
            self._build_turn(place)

    async def _tried(self, work: Awaitable[None]) -> bool:
        """Do the work and return whether it succeeded. If not, show the person why."""
        try:
            await work
        except (Refused, EditRefused, GeneratorFailed) as error:
            self._tell(str(error))
            return False
        return True

    def _send(self, message: str) -> None:
        try:
            self.writer.ask(self.conversation, message)
        except Refused as error:
            self._tell(str(error))
            return
        self._close_edit()
        self.message.value = ""
        self.refresh()
        self.page.client.run_javascript(TO_MESSAGE)

    def _stop(self) -> None:
        self.writer.stop(self.conversation)

    def _choose(self, place: int, number: int) -> None:
        try:
            self.writer.choose(self.conversation, place, number)
        except Refused as error:
            self._tell(str(error))

    def _save(self, place: int, branch: Branch) -> None:
        if branch.is_saved:  # by a second click
            return
        try:
            about = saving.about(self.conversation.person, self.writer.model)
            saved = saving.edit_rows(self.conversation.turns[: place + 1], branch, about, self.marks)
            self.edits.append(saved)
        except (Refused, OSError) as error:
            self._tell(str(error))
            return
        branch.is_saved = True
        pair = (
            "as a preference pair" if saved.pair else "not as a preference pair: without thinking the answers are alike"
        )
        self._tell(f"Saved as an SFT row, and {pair}.", is_problem=False)
        self._build_turn(place)

    def _name(self, event: events.ValueChangeEventArguments[Any]) -> None:
        self.conversation.person = str(event.value or "")[: saving.LONGEST_NAME]

    def _numbers(self, event: events.ValueChangeEventArguments[Any]) -> None:
        self.page.classes(**({"add": "numbers"} if event.value else {"remove": "numbers"}))

    def _search(self, event: events.ValueChangeEventArguments[Any]) -> None:
        self.conversation.searches = bool(event.value)

    def _fill(self) -> None:
        """Show the new text of the last answer."""
        if self.last is not None:
            turn, branch, areas, search = self.last
            self._fill_branch(turn, branch, areas)
            if search is not None:
                search.fill()

    def _fill_branch(self, turn: Turn, branch: Branch, areas: Mapping[str, Area]) -> None:
        sections = sections_of(turn, branch, self.marks)
        for part, section in ((THINKING, sections.thinking), (ANSWER, sections.answer)):
            if part in areas:
                areas[part].fill(within(branch, section))

    def _tell(self, message: str, is_problem: bool = True) -> None:
        """Notify the person of what was done or did not work. The element whose event led here may be gone."""
        kind: Any = "negative" if is_problem else "positive"
        with self.page:
            ui.notify(message, type=kind, position="top", multi_line=True, timeout=10_000)
