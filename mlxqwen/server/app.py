"""The ASGI application: which path leads where, and what stands before them all."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route

from mlxqwen import __version__
from mlxqwen.server.access import KeyCheck, OriginCheck, error_response
from mlxqwen.server.endpoints import chat_completions, completions, count_tokens, messages
from mlxqwen.server.errors import ApiError
from mlxqwen.server.journal import Journal
from mlxqwen.server.near_paths import follows_another, meant_path
from mlxqwen.server.openapi import document
from mlxqwen.server.page_files import page_routes
from mlxqwen.server.responses_endpoints import (
    cancel_response,
    compact,
    delete_response,
    list_input_items,
    responses,
    show_response,
)
from mlxqwen.server.service import Service, endpoint
from mlxqwen.server.texts import detokenize, tokenize

__all__ = ["make_app"]

_Handler = Callable[[Service, HttpRequest], Awaitable[Response]]


async def list_models(service: Service, http: HttpRequest) -> Response:
    """`GET /v1/models`."""
    return JSONResponse({"object": "list", "data": [entry.described() for entry in service.models.entries]})


async def show_model(service: Service, http: HttpRequest) -> Response:
    """`GET /v1/models/{id}`."""
    if not http.path_params["name"]:  # a slash too much
        return await _http_error(http, HTTPException(404))
    return JSONResponse(service.models.find(http.path_params["name"]).described())


async def health(service: Service, http: HttpRequest) -> Response:
    """`GET /health`: 200 while requests are answered; how many models are loaded needs no key, their names do."""
    service.load.check_open()
    for scheduler in (model.engine.scheduler for model in service.models.loaded):
        if scheduler.is_closed:
            raise ApiError(503, "engine: closed, expected an open one", code="engine_closed")
        if (seconds := scheduler.step_seconds) > service.settings.stuck_seconds:
            raise ApiError(
                503, f"engine: stuck in one step for {seconds:.0f} s, expected it to go on", code="engine_stuck"
            )
    return JSONResponse({"status": "ok", "models": service.models.count()})


async def version(service: Service, http: HttpRequest) -> Response:
    """`GET /version`."""
    return JSONResponse({"version": __version__})


async def metrics(service: Service, http: HttpRequest) -> Response:
    """`GET /metrics`."""
    return Response(service.metrics.page(), media_type="text/plain; version=0.0.4")


async def openapi(service: Service, http: HttpRequest) -> Response:
    """`GET /openapi.json`."""
    return JSONResponse(document())


_GET: dict[str, _Handler] = {
    "/v1/models": list_models,
    "/health": health,
    "/version": version,
    "/metrics": metrics,
    "/openapi.json": openapi,
}
_POST: dict[str, _Handler] = {
    "/v1/chat/completions": chat_completions,
    "/v1/completions": completions,
    "/v1/messages": messages,
    "/v1/messages/count_tokens": count_tokens,
    "/v1/responses": responses,
    "/v1/responses/compact": compact,
    "/tokenize": tokenize,
    "/detokenize": detokenize,
}

_BY_ID: tuple[tuple[str, str, _Handler], ...] = (
    ("GET", "/v1/models/{name:path}", show_model),
    ("GET", "/v1/responses/{id}", show_response),
    ("DELETE", "/v1/responses/{id}", delete_response),
    ("POST", "/v1/responses/{id}/cancel", cancel_response),
    ("GET", "/v1/responses/{id}/input_items", list_input_items),
)

_PATHS = {
    **dict.fromkeys(_POST, "POST"),
    **dict.fromkeys(_GET, "GET"),
    **{path.replace(":path", ""): method for method, path, _ in reversed(_BY_ID)},
}
_METHODS = ("GET", "HEAD", "POST", "DELETE")
_BASE_URL = ". The base_url of OpenAI's clients ends with /v1, once"


def make_app(service: Service) -> Starlette:
    """The application of a service."""
    settings = service.settings

    def route(path: str, handler: _Handler, method: str) -> Route:
        return Route(path, endpoint(partial(handler, service)), methods=[method])

    routes = [
        *(route(path, handler, "GET") for path, handler in _GET.items()),
        *(route(path, handler, "POST") for path, handler in _POST.items()),
        *(route(path, handler, method) for method, path, handler in _BY_ID),
        *page_routes(),
    ]
    stack = [
        Middleware(Journal, service.load, service.metrics, {*_GET, *_POST}, settings.log_content),
        Middleware(OriginCheck, settings),
        Middleware(KeyCheck, settings),
    ]
    if settings.cors_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-mlxqwen-ignored", "retry-after"],
        )
        stack.insert(2, cors)
    made = Starlette(routes=routes, middleware=stack, exception_handlers={HTTPException: _http_error})
    made.router.redirect_slashes = False  # which would say nothing to who does not follow
    return made


async def _http_error(http: HttpRequest, error: Exception) -> Response:
    """404 and 405 in the form of the path's API; of a path that ends with a slash too much, 307 to the one without."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = error.headers if isinstance(error, HTTPException) else None
    path = http.scope["path"]
    meant = meant_path(path, _PATHS) if status == 404 else None
    allowed = _methods_of(http) if status == 405 else []
    if allowed:
        headers = {"Allow": ", ".join(allowed)}
    problems = {
        404: (_no_such_path(path, meant), "path_not_found"),
        405: (
            f"method: found {http.method[:16]!a}, expected {_one_of(allowed)}{_behind_another(path)}",
            "method_not_allowed",
        ),
    }
    problem, code = problems.get(status, ("request: not understood", None))
    if status == 404 and path.endswith("/") and path[:-1] in _PATHS and "{" not in path:
        query = f"?{http.url.query}" if http.url.query else ""
        status, headers = 307, {"location": f"{path[:-1]}{query}"}
    return error_response(http.scope, ApiError(status, problem, code=code, headers=headers), meant)


def _no_such_path(path: str, meant: str | None) -> str:
    """The problem of a path that leads nowhere; nothing of it is repeated."""
    if meant is None:
        return f"path: found none such, expected one of {', '.join((*_POST, *_GET))}"
    is_prefixed = path.rstrip("/").endswith(meant.removeprefix("/v1")) and path.split("/").count("v1") != 1
    way_out = _base_url(meant) if is_prefixed or follows_another(path, meant, _PATHS) else ""
    return f"path: found none such, expected {_PATHS[meant]} {meant}{way_out}"


def _behind_another(path: str) -> str:
    """The way out of a path whose end is meant for another endpoint than the one that it leads to; empty for others."""
    meant = meant_path(path, _POST)
    return _base_url(meant) if meant is not None and follows_another(path, meant, _PATHS) else ""


def _base_url(meant: str) -> str:
    """What the base of clients that ask this path has to be."""
    is_anthropic = meant.startswith("/v1/messages")
    return ". The base_url of Anthropic's clients ends without /v1" if is_anthropic else _BASE_URL


def _methods_of(http: HttpRequest) -> list[str]:
    """The methods that a path has, by whichever of its routes."""
    routes = [one for one in http.app.routes if isinstance(one, Route) and one.matches(http.scope)[0] is not Match.NONE]
    return [name for name in _METHODS if any(name in (route.methods or ()) for route in routes)]


def _one_of(names: list[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
