"""The container files as texts: what linters say of them, and the rules of this repository that no linter knows."""

import json
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import podman_compose
import yaml

import dockerfile

BIN = pathlib.Path(sys.executable).parent
# What a stop takes beside the drain, in seconds: ends of the sessions, of run log and traces, of the database (docs/operations.md).
CLOSING = 10 + 5 + 5
SECRETS = ("PORTOLAN_TOKEN", "PORTOLAN_KEY", "POSTGRES_PASSWORD")
GIVEN = {"PORTOLAN_TOKEN": "a-token-of-the-tests", "PORTOLAN_KEY": "ab" * 32, "POSTGRES_PASSWORD": "a-password-of-the-tests"}
SERVED = ("stdio", "slim")


def run(*command, **more):
    return subprocess.run(command, text=True, capture_output=True, **more)


def passes(*command, **more):
    done = run(*command, **more)
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}:\n{done.stdout}{done.stderr}"


def seconds(text):
    number, unit = re.fullmatch(r"(\d+)(s|m)", text).groups()
    return int(number) * {"s": 1, "m": 60}[unit]


def compose(root, given):
    """compose.yaml with these variables in place, as podman-compose reads it. A missing one raises RuntimeError."""

    def fill(value):
        if isinstance(value, dict):
            return {name: fill(part) for name, part in value.items()}
        if isinstance(value, list):
            return [fill(part) for part in value]
        return podman_compose.rec_subs(value, given) if isinstance(value, str) else value

    return fill(yaml.safe_load((root / "compose.yaml").read_text()))


def manifests(root):
    folder = root / "deploy/kubernetes"
    names = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    found = {}
    for name in names:
        for one in yaml.safe_load_all((folder / name).read_text()):
            found[one["kind"]] = one
    return found


def containers_of(root):
    pod = manifests(root)["Deployment"]["spec"]["template"]["spec"]
    return pod, pod["containers"][0]


# --- Linters -----------------------------------------------------------------------------------------------------------------------


def hadolint_finds_nothing_in_the_dockerfile(root, folder):
    passes(BIN / "hadolint", "--failure-threshold=info", root / "Dockerfile")
    wrong = folder / "Dockerfile"
    wrong.write_text("FROM debian:latest\nRUN cd /tmp\n")
    assert run(BIN / "hadolint", wrong).returncode != 0, "it finds nothing in what is wrong"


def the_compose_specification_allows_compose_yaml(root, folder):
    # Not rules of taste: the order of keys, quotes. `image` is the name of what `build` makes.
    taste = ("no-build-and-image", "no-quotes-in-volumes", "no-unbound-port-interfaces", "require-quotes-in-ports")
    taste += ("service-keys-order", "services-alphabetical-order")
    without = [word for rule in taste for word in ("--disable-rule", rule)]
    lint = ["node", root / "tests/containers/node_modules/dclint/bin/dclint.cjs", "--max-warnings=0"]
    passes(*lint, root / "compose.yaml", *without)
    wrong = folder / "compose.yaml"
    wrong.write_text("services:\n  portolan:\n    image: portolan:1\n    imagee: x\n")
    assert run(*lint, wrong, *without).returncode != 0, "it finds nothing in what is wrong"


def the_schemas_of_kubernetes_allow_the_manifests(root, folder):
    validate = (BIN / "kubernetes-validate", "--strict", "--quiet")
    names = sorted(path for path in (root / "deploy/kubernetes").glob("*.yaml") if path.stem not in ("kustomization", "prometheus-adapter"))
    passes(*validate, *names)
    wrong = folder / "wrong.yaml"
    wrong.write_text((root / "deploy/kubernetes/disruption.yaml").read_text().replace("maxUnavailable", "maxUnavailible"))
    assert run(*validate, wrong).returncode != 0, "it finds nothing in what is wrong"
    if not shutil.which("kubectl"):
        return "(kubectl, which is not here, would put them together)"
    passes("kubectl", "kustomize", root / "deploy/kubernetes")
    return "(kubectl puts them together)"


# --- Dockerfile --------------------------------------------------------------------------------------------------------------------


def both_images_run_as_nobody_in_particular_and_without_a_shell(root, _):
    stages = dockerfile.read(root / "Dockerfile")
    assert stages[-1].name == "slim", "what is built without --target is the slim one"
    images = [stage for stage in stages if stage.name in SERVED]
    assert len(images) == len(SERVED)
    for stage in images:
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", stage.only("USER").text), "a number: Kubernetes cannot look up names"
        for name in ("ENTRYPOINT", "HEALTHCHECK", "VOLUME"):
            assert stage.only(name).listed, f"{name} of {stage.name} is in the exec form"
        program = stage.only("ENTRYPOINT").listed
        assert stage.only("HEALTHCHECK").listed == [*program, "healthcheck"], "the program's own"
        assert stage.only("ENV").pairs["PORTOLAN_DATA_DIR"] in stage.only("VOLUME").listed
        assert stage.only("ENV").pairs["PORTOLAN_LISTEN"].endswith(f":{stage.only('EXPOSE').text}")
    assert not stages[-1].all("RUN") and "distroless" in stages[-1].base, "there is nothing to run it with"


def nothing_secret_can_come_into_an_image(root, _):
    texts = [line for line in (root / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert texts[0] == "*", "nothing comes in that is not named"
    allowed = {line[1:] for line in texts[1:]}
    copied = set()
    for stage in dockerfile.read(root / "Dockerfile"):
        assert stage.base.count(":") == 1 or stage.base in ("uv", "build"), f"{stage.base} says which version"
        assert not stage.base.endswith(":latest")
        for one in stage.instructions:
            assert not re.search(r"(?i)token|passw|secret|_key", one.text), one.text
            assert one.name != "ADD" and "--mount" not in one.text
            if one.name == "COPY" and "from" not in one.flags:
                copied.update(one.words[:-1])
    assert copied == allowed, f"the Dockerfile copies {copied}, .dockerignore lets in {allowed}"
    assert all((root / name).exists() for name in copied)


def versions_are_those_of_cargo_toml(root, _):
    package = tomllib.loads((root / "Cargo.toml").read_text())["package"]
    stages = dockerfile.read(root / "Dockerfile")
    [build] = [stage for stage in stages if stage.name == "build"]
    release, debian = re.fullmatch(r"rust:(\d+\.\d+)-slim-(\w+)", build.base).groups()
    numbers = lambda text: [int(part) for part in text.split(".")][:2]
    assert numbers(release) >= numbers(package["rust-version"])
    # What is built against a glibc does not run with an older one.
    assert debian == "bookworm" and "bookworm" in stages[-2].base and "debian12" in stages[-1].base
    for stage in stages[-2:]:
        assert stage.only("LABEL").pairs["org.opencontainers.image.version"] == package["version"]
        assert stage.only("LABEL").pairs["org.opencontainers.image.licenses"] == package["license"]
    [image] = yaml.safe_load((root / "deploy/kubernetes/kustomization.yaml").read_text())["images"]
    assert image["newTag"] == package["version"]
    for name in SERVED:
        given = GIVEN | {"TARGET": name}
        assert compose(root, given)["services"]["portolan"]["image"] == f"portolan:{package['version']}-{name}"


# --- compose.yaml ------------------------------------------------------------------------------------------------------------------


def compose_refuses_without_a_token_a_key_and_a_password_and_says_how_to_make_them(root, _):
    for name in SECRETS:
        for missing in ({key: value for key, value in GIVEN.items() if key != name}, GIVEN | {name: ""}):
            try:
                compose(root, missing)
            except Exception as refused:
                said = str(refused)
                assert "openssl rand" in said and f"{name}=" in said, said
            else:
                raise AssertionError(f"it starts without {name}")
    # The control, and that nothing else has to be given.
    services = compose(root, GIVEN)["services"]
    environment = services["portolan"]["environment"]
    assert environment["PORTOLAN_TOKEN"] == GIVEN["PORTOLAN_TOKEN"] and environment["PORTOLAN_KEY"] == GIVEN["PORTOLAN_KEY"]
    assert GIVEN["POSTGRES_PASSWORD"] in environment["DATABASE_URL"]


def the_stack_is_two_closed_replicas_behind_a_proxy(root, _):
    stack = compose(root, GIVEN)
    services = stack["services"]
    assert services["portolan"]["deploy"]["replicas"] == 2
    for name in ("portolan", "proxy"):
        service = services[name]
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"], name
    [port] = services["proxy"]["ports"]
    assert port.startswith("127.0.0.1:"), "plain HTTP is for this machine"
    assert not any("ports" in service for name, service in services.items() if name != "proxy")
    assert stack["networks"]["back"]["internal"] and services["postgres"]["networks"] == ["back"]
    assert services["proxy"]["networks"] == ["front"], "it does not reach the database"
    for name, other in (("proxy", "portolan"), ("portolan", "postgres")):
        assert services[name]["depends_on"][other]["condition"] == "service_healthy"
    drain = seconds(services["portolan"]["environment"]["PORTOLAN_DRAIN_TIMEOUT"])
    assert seconds(services["portolan"]["stop_grace_period"]) >= drain + CLOSING
    assert (root / ".gitignore").read_text().splitlines().count("/.env") == 1


# --- Kubernetes --------------------------------------------------------------------------------------------------------------------


def kubernetes_gives_a_stop_the_time_it_takes(root, _):
    pod, container = containers_of(root)
    before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = seconds(manifests(root)["ConfigMap"]["data"]["PORTOLAN_DRAIN_TIMEOUT"])
    assert pod["terminationGracePeriodSeconds"] == before + drain + CLOSING


def kubernetes_starts_nothing_anew_for_want_of_a_database(root, _):
    _, container = containers_of(root)
    path = lambda probe: container[probe]["httpGet"]["path"]
    assert path("livenessProbe") == path("startupProbe") == "/v1/health" and path("readinessProbe") == "/v1/ready"
    for probe in ("livenessProbe", "startupProbe", "readinessProbe"):
        # With --allowed-hosts, the address of a pod is none of its names.
        assert {"name": "Host", "value": "localhost"} in container[probe]["httpGet"]["httpHeaders"]
        assert container[probe]["httpGet"]["port"] in [port["name"] for port in container["ports"]]
    start = container["startupProbe"]
    assert start["periodSeconds"] * start["failureThreshold"] > 600, "longer than a wait for another's migration"
    ready = container["readinessProbe"]
    assert ready["periodSeconds"] * ready["failureThreshold"] >= 60, "longer than a restart of the database"
    # --acquire of a connection takes 5 s before it is given up.
    assert ready["timeoutSeconds"] > 5


def as_many_replicas_as_there_may_be_find_room_in_postgresql(root, _):
    """Each holds its connections and one that follows changes; PostgreSQL takes 100 by default, three of them for its superusers."""
    services = yaml.safe_load((root / "compose.yaml").read_text())["services"]
    [room] = re.findall(r"max_connections=(\d+)", " ".join(services["postgres"]["command"]))
    [named] = re.findall(r"server-template replica (\d+) ", (root / "deploy/haproxy/haproxy.cfg").read_text())
    assert "PORTOLAN_DATABASE_CONNECTIONS" not in services["portolan"]["environment"], "16 is the default"
    assert int(named) * (16 + 1) <= int(room) - 3
    connections = int(manifests(root)["ConfigMap"]["data"]["PORTOLAN_DATABASE_CONNECTIONS"])
    assert manifests(root)["HorizontalPodAutoscaler"]["spec"]["maxReplicas"] * (connections + 1) <= 100 - 3


def pods_are_restricted_and_get_their_secrets_as_files(root, _):
    pod, container = containers_of(root)
    every, own = pod["securityContext"], container["securityContext"]
    assert every["runAsNonRoot"] and every["runAsUser"] == 65532 and every["seccompProfile"]["type"] == "RuntimeDefault"
    assert own["readOnlyRootFilesystem"] and not own["allowPrivilegeEscalation"] and own["capabilities"]["drop"] == ["ALL"]
    assert pod["automountServiceAccountToken"] is False
    enforced = manifests(root)["Namespace"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
    assert enforced == "restricted"
    [image] = [stage for stage in dockerfile.read(root / "Dockerfile") if stage.name == "slim"]
    assert image.only("USER").text == f"{every['runAsUser']}:{every['runAsGroup']}"
    example = yaml.safe_load((root / "deploy/kubernetes/secret.example.yaml").read_text())
    assert not any(example["stringData"].values()), "no value is an example"
    listed = yaml.safe_load((root / "deploy/kubernetes/kustomization.yaml").read_text())["resources"]
    here = {path.name for path in (root / "deploy/kubernetes").glob("*.yaml")}
    assert here - set(listed) == {"kustomization.yaml", "secret.example.yaml", "prometheus-adapter.yaml"}
    [mount] = [one for one in container["volumeMounts"] if one["name"] == "secrets"]
    variables = {one["name"]: one["value"] for one in container["env"]}
    assert set(variables) == {"DATABASE_URL_FILE", "PORTOLAN_KEY_FILE", "PORTOLAN_TOKENS_FILE"}
    assert {value for value in variables.values()} == {f"{mount['mountPath']}/{key}" for key in example["stringData"]}
    settings = manifests(root)["ConfigMap"]["data"]
    assert not any(re.search(r"TOKEN|KEY|PASSWORD|DATABASE_URL", name) for name in settings)
    [data] = [one for one in container["volumeMounts"] if one["name"] == "data"]
    assert settings["PORTOLAN_DATA_DIR"].startswith(data["mountPath"])


def all_parts_mean_the_same_pods_ports_and_metric(root, _):
    found = manifests(root)
    _, container = containers_of(root)
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = [found["Service"]["spec"]["selector"], found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]]
    selectors += [found[kind]["spec"]["selector"]["matchLabels"] for kind in ("Deployment", "PodDisruptionBudget")]
    assert all(selector == labels for selector in selectors)
    settings = found["ConfigMap"]["data"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert settings["PORTOLAN_LISTEN"] == f"0.0.0.0:{ports['http']}" and settings["PORTOLAN_METRICS_LISTEN"] == f"0.0.0.0:{ports['metrics']}"
    allowed = {port["port"] for rule in found["NetworkPolicy"]["spec"]["ingress"] for port in rule["ports"]}
    assert allowed == set(ports.values()) and all(rule["from"] for rule in found["NetworkPolicy"]["spec"]["ingress"])
    world = found["NetworkPolicy"]["spec"]["egress"][-1]["to"][0]["ipBlock"]
    assert world["cidr"] == "0.0.0.0/0" and "169.254.0.0/16" in world["except"]
    [metric] = found["HorizontalPodAutoscaler"]["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert f"\n{name} gauge " in (root / "tests/data/metrics.txt").read_text(), "Portolan has that metric"
    [rule] = yaml.safe_load((root / "deploy/kubernetes/prometheus-adapter.yaml").read_text())["rules"]["custom"]
    assert rule["name"]["as"] == name and rule["seriesQuery"].startswith(name)
    target = found["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", found["Deployment"]["metadata"]["name"])
    assert found["HorizontalPodAutoscaler"]["spec"]["minReplicas"] >= 2
    assert "replicas" not in found["Deployment"]["spec"], "each apply would take back what the autoscaler did"
    assert container["image"] == yaml.safe_load((root / "deploy/kubernetes/kustomization.yaml").read_text())["images"][0]["name"]


def settings_in_the_files_are_settings_of_the_program(root, _):
    known = set(re.findall(r"`([A-Z][A-Z_]+)`", (root / "README.md").read_text()))
    _, container = containers_of(root)
    named = set(compose(root, GIVEN)["services"]["portolan"]["environment"])
    named |= set(manifests(root)["ConfigMap"]["data"]) | {one["name"] for one in container["env"]}
    for stage in dockerfile.read(root / "Dockerfile")[-2:]:
        named |= set(stage.only("ENV").pairs)
    assert len(named) > 10 and named <= known, f"README does not know {named - known}"


TESTS = [
    hadolint_finds_nothing_in_the_dockerfile,
    the_compose_specification_allows_compose_yaml,
    the_schemas_of_kubernetes_allow_the_manifests,
    both_images_run_as_nobody_in_particular_and_without_a_shell,
    nothing_secret_can_come_into_an_image,
    versions_are_those_of_cargo_toml,
    compose_refuses_without_a_token_a_key_and_a_password_and_says_how_to_make_them,
    the_stack_is_two_closed_replicas_behind_a_proxy,
    kubernetes_gives_a_stop_the_time_it_takes,
    kubernetes_starts_nothing_anew_for_want_of_a_database,
    as_many_replicas_as_there_may_be_find_room_in_postgresql,
    pods_are_restricted_and_get_their_secrets_as_files,
    all_parts_mean_the_same_pods_ports_and_metric,
    settings_in_the_files_are_settings_of_the_program,
]
