"""Command lines of Java programs, small enough for a whole cluster on one machine."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from clusters.processes import ClusterError

__all__ = ["class_path", "java_command", "write_logging"]

# Engines look into Java's own classes, which Java 17 allows only where it is told so.
_OPENED = (
    *(
        "java.lang",
        "java.lang.invoke",
        "java.lang.reflect",
        "java.io",
        "java.net",
        "java.nio",
        "java.text",
        "java.time",
    ),
    *("java.util", "java.util.concurrent", "java.util.concurrent.atomic", "java.util.concurrent.locks"),
    *("sun.nio.ch", "sun.nio.cs", "sun.security.action", "sun.util.calendar"),
)

_LOG4J = """rootLogger.level = INFO
rootLogger.appenderRef.console.ref = console
appender.console.type = Console
appender.console.name = console
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d{HH:mm:ss.SSS} %-5p %c{1} - %m%n
"""


def java_command(
    main: str,
    jars: Sequence[Path],
    logging: Path,
    arguments: Sequence[str],
    megabytes: int,
    options: Sequence[str] = (),
) -> list[str]:
    """The command that runs a main class.

    Args:
        main: the class.
        jars: folders of jars, and jars.
        logging: what `write_logging` wrote.
        arguments: of the program.
        megabytes: of its heap.
        options: of Java itself.
    """
    java = shutil.which("java")
    if java is None:
        raise ClusterError("java was not found: expected Java 17 on PATH; install it, as Debian's default-jre-headless")
    return [
        java,
        f"-Xmx{megabytes}m",
        "-XX:+UseSerialGC",
        "-XX:TieredStopAtLevel=1",  # starts sooner; the work is done by Python
        f"-Dlog4j2.configurationFile={logging}",
        *java_openings(),
        *options,
        "-cp",
        class_path(jars),
        main,
        *arguments,
    ]


def java_openings() -> list[str]:
    """What Java 17 is told on its command line."""
    return [f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in _OPENED]


def class_path(jars: Sequence[Path]) -> str:
    """Folders of jars, and jars, as Java takes them; the first has precedence."""
    return ":".join(f"{path}/*" if path.is_dir() else str(path) for path in jars)


def write_logging(folder: Path) -> Path:
    """A configuration by which programs print their log."""
    path = folder / "log4j2.properties"
    path.write_text(_LOG4J, encoding="utf-8")
    return path
