"""`trl-mprm serve`: a model over HTTP; `trl-mprm export`: a model for vLLM."""

import argparse
import ipaddress
import os

from .arguments import add_command, add_model_arguments, load_prm, positive, print_table


API_KEY = "TRL_MPRM_API_KEY"


EXAMPLES = [
    ("Serve a model to this machine, with a page on which to try it", "trl-mprm serve runs/my-prm --ui"),
    (
        "Serve it to others",
        "trl-mprm serve runs/my-prm --host 0.0.0.0 --api-key SECRET --dtype bfloat16",
    ),
]

EXPORT_EXAMPLES = [
    ("Write the folder", "trl-mprm export runs/my-prm runs/my-prm-vllm"),
    (
        "Compare the scores of the running server with ours",
        "trl-mprm export runs/my-prm runs/my-prm-vllm --check http://127.0.0.1:8000",
    ),
]


def add_parser(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "serve",
        serve,
        "score over HTTP",
        "Load a model once and score over HTTP. Requests have the form that vLLM's /pooling takes; /best_of_n ranks the "
        "candidates of a question and encodes their picture only once.",
        EXAMPLES,
    )
    add_model_arguments(command)
    command.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; one that others can reach needs an API key"
    )
    command.add_argument("--port", type=int, default=8000, help="port to listen on")
    command.add_argument("--served-model-name", default="prm", help="name of the model in requests")
    command.add_argument(
        "--api-key",
        help=f"key that every request must carry; default: the variable {API_KEY}; '' lets everyone in",
    )
    command.add_argument("--image-root", help="folder of images on this machine that requests may name")
    command.add_argument(
        "--allow-image-host",
        action="append",
        default=[],
        help="host from which images may be fetched; repeat for several; default: none",
    )
    command.add_argument("--max-body-mb", type=positive, default=32, help="maximum size of a request, in MiB")
    command.add_argument("--max-waiting", type=positive, default=1024, help="maximum number of waiting solutions")
    command.add_argument("--ui", action="store_true", help="also serve a page at / on which to try the model")

    command = add_command(
        commands,
        "export",
        export,
        "write a folder that vLLM serves without a plugin",
        "Write a copy of a model that vLLM loads without a plugin: adapters are merged, and its configuration names the "
        "tokens that stand for a good and a bad step. SERVE.md in the folder has the command to start the server.",
        EXPORT_EXAMPLES,
    )
    add_model_arguments(command)
    command.add_argument("folder", help="folder to write; with --check, an export that exists")
    command.add_argument("--for", dest="target", default="vllm", choices=["vllm"], help="the server to write it for")
    command.add_argument("--served-model-name", default="prm", help="name of the model in requests")
    command.add_argument(
        "--check", metavar="URL", help="write nothing; compare the scores of a running server with those stored here"
    )


def serve(args: argparse.Namespace) -> int:
    api_key = os.environ.get(API_KEY) if args.api_key is None else args.api_key
    if api_key is None and not _is_loopback(args.host):
        raise ValueError(f"--host {args.host} is open to others: set a key (--api-key, or {API_KEY})")
    if args.image_root is not None and not os.path.isdir(args.image_root):
        raise ValueError(f"--image-root {args.image_root}: no such folder")
    from ..serving.pictures import Limits, Pictures
    from ..serving.server import create_app, run

    prm = load_prm(args)
    limits = Limits(body_bytes=args.max_body_mb * 2**20, waiting=args.max_waiting)
    pictures = Pictures(limits, args.image_root, tuple(args.allow_image_host))
    app = create_app(
        prm, args.served_model_name, api_key=api_key or None, pictures=pictures, limits=limits, ui=args.ui
    )
    address = f"http://{args.host}:{args.port}"
    rows = [["model", args.model], ["scores", f"POST {address}/pooling"], ["ranking", f"POST {address}/best_of_n"]]
    rows += [["API page", f"{address}/docs"]] + [["page to try it", f"{address}/"]] * args.ui
    print_table([["serving", ""], *rows])
    run(app, args.host, args.port)
    return 0


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def export(args: argparse.Namespace) -> int:
    if args.check:
        from ..serving.check import check

        result = check(args.check, args.folder, os.environ.get(API_KEY))
        print_table([["", "here and there"], *([name.replace("_", " "), value] for name, value in result.items())])
        return int(result["verdict"].startswith("DIFFERENT"))
    from ..serving.export import export_for_vllm

    written = export_for_vllm(load_prm(args), args.folder, args.served_model_name)
    print_table([["", "exported"], *map(list, written.items())])
    print(
        f"\nfolder: {args.folder}\nserve: see {args.folder}/SERVE.md\ncompare: trl-mprm export {args.model} ", end=""
    )
    print(f"{args.folder} --check http://127.0.0.1:8000")
    return 0
