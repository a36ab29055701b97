"""Tree View's pause: the run waits in the node until leaves are chosen in the page, or over HTTP."""

from __future__ import annotations

import json
import logging
import threading
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.utils
from comfy_api.latest import io
from comfy_execution.utils import get_executing_context

from .inputs import workflow_id

#: The event that tells pages what waits now, see `web/tmpo_pause.js`.
EVENT = "tmpo.waiting"
#: A page asks at the first address when it is opened in the middle of a run. The second takes the choice.
WAITING, CONTINUE = "/tmpo/waiting", "/tmpo/continue"
#: Seconds between two looks at whether the run was cancelled.
LOOK = 0.1


@dataclass
class Waiting:
    """A node that waits. message: what pages are told. check: raises ValueError for a choice that the node does not take."""

    message: dict[str, Any]
    check: Callable[[str], object]
    choice: str = ""
    done: threading.Event = field(default_factory=threading.Event)


#: By an id that is new each time, so that a page that comes late does not answer for another tree.
_waiting: dict[str, Waiting] = {}


#: How often a wait has been answered, by the choice that stood in the node before.
_answers: Counter[str] = Counter()


def answers(before: str) -> int:
    """What must differ between two runs of a node that waits, or ComfyUI would take the first one's choice from its cache.

    before: the choice that stands in the node.
    """
    return _answers[before]


def wait_for_choice(
    report: dict[str, Any], before: str, check: Callable[[str], object], node: type[io.ComfyNode]
) -> str:
    """Waits without a limit of time until a choice comes in. It is a text as for Tree View's input `selected`.

    report: the tree for the view. before: the choice that stands in the node. check: raises ValueError for a text that is no
    choice; the wait goes on then.

    Raises:
        comfy.model_management.InterruptProcessingException: the run was cancelled.
    """
    # Only a running server sets the hook. Without one, nobody could answer.
    if comfy.utils.PROGRESS_BAR_HOOK is None:
        logging.warning("Tree View: pause needs a running ComfyUI server, so this run goes on without a choice")
        return ""
    from server import PromptServer

    server, context = PromptServer.instance, get_executing_context()
    place, key = None if context is None else context.node_id, uuid.uuid4().hex
    # A page shows what its open workflow has queued, in this page or another. A script may queue without a workflow.
    message = {"id": key, "node": place, "client": server.client_id, "workflow": workflow_id(node), "tree": report}
    waiting = _waiting[key] = Waiting(message, check)
    server.send_sync(EVENT, [message])
    logging.info(
        "Tree View (node %s) waits for a choice: choose leaves in it and press Continue, or POST %s to %s",
        place, json.dumps({"id": key, "choice": "0"}), CONTINUE,
    )  # fmt: skip
    try:
        while not waiting.done.wait(LOOK):
            comfy.model_management.throw_exception_if_processing_interrupted()
        _answers[before] += 1
        return waiting.choice
    finally:
        del _waiting[key]
        server.send_sync(EVENT, [])


def add_routes() -> None:
    """Adds the two addresses to ComfyUI's server, if there is one."""
    from aiohttp import web
    from server import PromptServer

    # A script that loads the pack without a server has no instance.
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return

    @server.routes.get(WAITING)
    async def waiting(_: web.Request) -> web.Response:
        return web.json_response([each.message for each in list(_waiting.values())])

    @server.routes.post(CONTINUE)
    async def go_on(request: web.Request) -> web.Response:
        try:
            given = await request.json()
            key, choice = given["id"], given["choice"]
            if not isinstance(key, str) or not isinstance(choice, str):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            return web.Response(status=400, text='send JSON such as {"id": "...", "choice": "12, 3"}')
        found = _waiting.get(key)
        if found is None or found.done.is_set():
            return web.Response(status=404, text="this Tree View does not wait any more: run the workflow again")
        try:
            found.check(choice)
        except ValueError as error:
            return web.Response(status=400, text=str(error))
        found.choice = choice
        found.done.set()
        return web.Response(text="")
