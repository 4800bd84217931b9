"""`trl-mprm serve`: a model over HTTP; `trl-mprm export`: a model for vLLM."""

import argparse
import ipaddress
import os

from .arguments import ShowDefaults, add_model_arguments, load_prm, positive, print_table


API_KEY = "TRL_MPRM_API_KEY"


def add_parser(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("serve", help="score over HTTP", formatter_class=ShowDefaults)
    command.set_defaults(command=serve)
    add_model_arguments(command)
    command.add_argument("--host", default="127.0.0.1", help="address to listen on; any but loopback needs a key")
    command.add_argument("--port", type=int, default=8000)
    command.add_argument("--served-model-name", default="prm")
    command.add_argument("--api-key", help=f"key that every request must carry, or set {API_KEY}; '' lets everyone in")
    command.add_argument("--image-root", help="folder of pictures that requests may name")
    command.add_argument(
        "--allow-image-host", action="append", default=[], help="host from which pictures may be fetched"
    )
    command.add_argument("--max-body-mb", type=positive, default=32, help="largest request")
    command.add_argument("--max-waiting", type=positive, default=1024, help="maximum number of waiting solutions")
    command.add_argument("--ui", action="store_true", help="also serve a page at / for trying the model")

    command = commands.add_parser(
        "export", help="write a folder that vLLM serves unchanged", formatter_class=ShowDefaults
    )
    command.set_defaults(command=export)
    add_model_arguments(command)
    command.add_argument("folder", help="folder to write, or with --check an existing export")
    command.add_argument("--for", dest="target", default="vllm", choices=["vllm"], help="the server")
    command.add_argument("--served-model-name", default="prm")
    command.add_argument("--check", metavar="URL", help="compare the scores of a running server with those here")


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
