import contextlib, importlib.util, os, sys
@contextlib.contextmanager
def stand_ins():
    spec = importlib.util.spec_from_file_location("proto_authors", os.environ["PROTO"])
    m = importlib.util.module_from_spec(spec); spec.loader.exec_module(m)
    fork = [p + "/mamba_ssm" for p in sys.path if os.path.isdir(p + "/mamba_ssm")]
    name = os.environ.get("FORK")
    m.install(name); m.install_more()
    yield
