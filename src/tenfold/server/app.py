"""The application: routes, and what stands around them."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.responses import FileResponse, JSONResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from tenfold.engine.request import AsyncEngine
from tenfold.server import chat, completions
from tenfold.server.asking import Workers
from tenfold.server.cost import Prices
from tenfold.server.errors import add_handlers
from tenfold.server.limits import Gate
from tenfold.server.metrics import CountRequests, Metrics
from tenfold.server.responses import Health, Model, ModelList, documented
from tenfold.server.serving import Serving
from tenfold.server.settings import ServeSettings
from tenfold.server.tokens import TokenTexts
from tenfold.server.tools import Dialect

PAGE = Path(__file__).with_name("page") / "index.html"
_PAGE_POLICY = "default-src 'self' 'unsafe-inline'; connect-src 'self'; img-src data:"


def make_app(engine: AsyncEngine, settings: ServeSettings) -> FastAPI:
    """The API of one engine. `app.state.serving` is what its routes share."""
    app = FastAPI(title="tenfold", description="OpenAI's API, and what sparsity saved.", redoc_url=None)
    template = engine.tokenizer.chat_template
    app.state.serving = serving = Serving(
        engine=engine,
        settings=settings,
        texts=TokenTexts(engine.tokenizer),
        workers=Workers(),
        metrics=Metrics(engine),
        prices=Prices(settings.price_per_hour, settings.watts, settings.price_per_kwh),
        dialect=None if template is None else Dialect(template),
    )
    add_handlers(app)
    # The last one added is the first to see a request.
    app.add_middleware(Gate, settings=settings)
    if settings.cors_origin:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origin, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(CountRequests, metrics=serving.metrics)
    # The gate asks for the key; this says so in the description.
    locked = [Depends(HTTPBearer(auto_error=False))] if settings.keys else []
    for router in (chat.router, completions.router):
        app.include_router(router, dependencies=locked)
    _add_models(app, serving, locked)
    _add_status(app, serving)
    return app


def _add_models(app: FastAPI, serving: Serving, locked: list[Any]) -> None:
    created = serving.started

    def entry() -> dict[str, Any]:
        return {"id": serving.name, "object": "model", "created": created, "owned_by": "tenfold"}

    @app.get("/v1/models", dependencies=locked, **documented(ModelList))
    async def models() -> JSONResponse:
        """The one model that is here."""
        return JSONResponse({"object": "list", "data": [entry()]})

    @app.get("/v1/models/{model:path}", dependencies=locked, **documented(Model))
    async def model(model: str) -> JSONResponse:
        serving.check_model(model)
        return JSONResponse(entry())

    @app.get("/v1/tenfold", dependencies=locked)
    async def tenfold() -> dict[str, Any]:
        """What the model is, and how busy the engine."""
        facts = {
            **asdict(serving.engine.facts),
            "name": serving.name,
            "chat_template": serving.dialect is not None,
        }
        return {"facts": facts, "load": asdict(serving.engine.load()), "prices": asdict(serving.prices)}


def _add_status(app: FastAPI, serving: Serving) -> None:
    @app.get("/health", responses={200: {"model": Health}, 503: {"model": Health}})
    async def health() -> JSONResponse:
        """200 while requests are taken, 503 while the server stops, or where its engine has."""
        status = "draining" if serving.draining else "failed" if serving.engine.stopped else "ok"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    @app.get("/metrics", responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(serving.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE, headers={"Content-Security-Policy": _PAGE_POLICY})
