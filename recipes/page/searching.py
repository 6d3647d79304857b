"""The elements that show a deliberate search.

These are the steps of its samples as they happen, the conclusion, and a person's own documents that the search reads.
"""

from collections.abc import Callable
from functools import partial
from urllib.parse import quote

from nicegui import ui

from recipes.page.documents import Library
from recipes.page.elements import button, plain
from rollout.deliberation.deliberating import Conclusion, Deliberation, link
from rollout.deliberation.episodes import ShownStep

# Route that returns a document's text by its id.
SOURCE = "/source"
# Route that takes the content of a person's own document.
DOCUMENTS = "/documents"
# The script sends no file that is too large. At its end it reports all refused files.
ADD = """async (event) => {
  const refused = [];
  for (const file of event.target.files) {
    if (file.size > LARGEST) {
      refused.push(file.name + ": more than " + LARGEST / 1024 + " KiB");
      continue;
    }
    try {
      const name = encodeURIComponent(file.name);
      const reply = await fetch("DOCUMENTS?name=" + name, {method: "POST", body: file});
      if (!reply.ok) refused.push(file.name + ": " + await reply.text());
    } catch (error) {
      refused.push(file.name + ": " + error);
    }
  }
  event.target.value = "";
  if (refused.length) emit(refused.join("\\n"));
}"""


class SearchArea:
    """The growing list of the samples' steps and, once there is one, the conclusion of the vote."""

    def __init__(self, deliberation: Deliberation) -> None:
        self.deliberation = deliberation
        self.samples: list[ui.element] = []
        self.shown = [0] * len(deliberation.episodes)
        with ui.element("div").classes("samples"):
            for episode in deliberation.episodes:
                with ui.element("section").classes("sample"):
                    plain(f"Sample {episode.sample + 1}", "h4")
                    self.samples.append(ui.element("ol"))
        self.fill()

    def fill(self) -> None:
        """Show the steps that are new."""
        for place, episode in enumerate(self.deliberation.episodes):
            with self.samples[place]:
                for step in episode.shown[self.shown[place] :]:
                    step_element(step)
            self.shown[place] = len(episode.shown)

    def conclude(self) -> None:
        """Show why samples failed, and the conclusion, if the search is complete and there is one."""
        for sample, episode in zip(self.samples, self.deliberation.episodes, strict=True):
            if episode.failure:
                with sample:
                    plain(f"no vote: {episode.failure}", "li", "notice")
        conclusion = self.deliberation.chosen if self.deliberation.is_complete else None
        if conclusion is None:
            return
        confidence = conclusion.confidence
        stated = "no confidence stated" if confidence is None else f"confidence {confidence:.1f} of 10"
        with ui.element("div").classes("head"):
            plain(f"{stated}: {'certain' if conclusion.is_certain else 'not certain'}", "span", "chip")
            for weighted, how in ((True, "weighted by confidence"), (False, "by majority")):
                of_vote = self.deliberation.conclusion(weighted)
                assert of_vote is not None  # both votes have an answer, or none has
                plain(f"{how}: {of_vote.answer} ({of_vote.share:.0%} of the votes)", "span", "chip")
        sources(conclusion)


def step_element(shown: ShownStep) -> None:
    """A step with its fault, the environment's reply, and links to the documents that the reply shows."""
    with ui.element("li").classes("step"):
        plain(shown.step.action, "b")
        plain(shown.step.content, "span", "text-inline")
        fault = shown.step.fault
        plain(fault or "ok", "span", "chip worse" if fault else "chip")
        if shown.reply is not None:
            plain(shown.reply.removeprefix("<result>").removesuffix("</result>"), classes="text reply")
        for document_id in dict.fromkeys(document.id for document in shown.documents):
            source_link(document_id)


def sources(conclusion: Conclusion) -> None:
    """The list of documents that were shown to the samples with the answer."""
    if conclusion.sources:
        plain("Sources", "h4")
    with ui.element("ul").classes("sources"):
        for source in conclusion.sources:
            with ui.element("li"):
                source_link(source.id)
                if source.has_answer:
                    plain("has the answer", "span", "chip")


def source_link(document_id: str) -> None:
    """A link to a document: to its web address if its id is one, otherwise to its text on this page."""
    element = plain(document_id, "a", "source")
    element.props["href"] = link(document_id) or f"{SOURCE}?id={quote(document_id, safe='')}"
    element.props["target"] = "_blank"
    element.props["rel"] = "noopener noreferrer"


class OwnDocuments:
    """The list of a session's own documents, with a field to add some. ``tell`` shows a problem to the person."""

    def __init__(self, library: Library, session: str, tell: Callable[[str], None]) -> None:
        self.library = library
        self.session = session
        self.names: list[str] | None = None
        largest = library.page.max_document_kib * 1024
        with ui.element("details").classes("documents") as self.around:
            self.title = plain("", "summary")
            plain(
                "While there are any, deliberate search reads these texts and no others. They stay in the memory of "
                "this page, for your browser alone, until you remove them or the page ends.",
                classes="soft",
            )
            self.list = ui.element("ul")
            with ui.element("label"):
                plain("Add texts (UTF-8) ", "span")
                field = ui.element("input").props("type=file multiple")
            script = ADD.replace("LARGEST", str(largest)).replace("DOCUMENTS", DOCUMENTS)
            field.on("change", lambda event: tell(str(event.args)), js_handler=script)

    def refresh(self) -> None:
        """Show the current documents. Another tab may have changed them."""
        names = self.library.names(self.session)
        if names == self.names:
            return
        self.names = names
        self.title.text = f"Own documents ({len(names)})"
        self.list.clear()
        with self.list:
            for name in names:
                with ui.element("li"):
                    plain(name, "span")
                    button("Remove", partial(self._remove, name)).props["aria-label"] = f"Remove {name}"

    async def _remove(self, name: str) -> None:
        """Remove a document if the person confirms it."""
        with self.around, ui.dialog() as dialog, ui.card():
            plain(f"Remove {name}? It is kept nowhere else here.")
            with ui.element("div").classes("head"):
                button("Remove it", lambda: dialog.submit(True))
                button("Keep it", lambda: dialog.submit(False))
        if await dialog:
            await self.library.remove(self.session, name)
        dialog.delete()
