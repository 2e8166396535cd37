"""Builds command lines of Java programs with small heaps, so that a cluster fits on one machine."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from clusters.processes import ClusterError

__all__ = ["class_path", "java_command", "list_java_openings", "write_log4j_config"]

# The engines access these packages by reflection, which Java 17 blocks by default.
_OPENED_PACKAGES = (
    *("java.lang", "java.lang.invoke", "java.lang.reflect", "java.io", "java.net", "java.nio", "java.text"),
    *("java.time", "java.util", "java.util.concurrent", "java.util.concurrent.atomic", "java.util.concurrent.locks"),
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
    log4j_config: Path,
    arguments: Sequence[str],
    megabytes: int,
    options: Sequence[str] = (),
) -> list[str]:
    """Returns the command that runs a main class.

    Args:
        main: name of the main class.
        jars: jars and folders of jars; earlier ones have precedence.
        log4j_config: file that `write_log4j_config` wrote.
        arguments: arguments of the program.
        megabytes: maximum size of the heap.
        options: options of the Java virtual machine.

    Raises:
        ClusterError: Java is not installed.
    """
    java = shutil.which("java")
    if java is None:
        raise ClusterError(
            "java was not found: expected Java 17 on PATH; install it, for example Debian's default-jre-headless"
        )
    return [
        java,
        f"-Xmx{megabytes}m",
        "-XX:+UseSerialGC",
        "-XX:TieredStopAtLevel=1",  # starts faster; Python does the actual work
        f"-Dlog4j2.configurationFile={log4j_config}",
        *list_java_openings(),
        *options,
        "-cp",
        class_path(jars),
        main,
        *arguments,
    ]


def list_java_openings() -> list[str]:
    """Returns the options that open Java's packages to reflection."""
    return [f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in _OPENED_PACKAGES]


def class_path(jars: Sequence[Path]) -> str:
    """Returns the class path of jars and folders of jars; earlier ones have precedence."""
    return ":".join(f"{path}/*" if path.is_dir() else str(path) for path in jars)


def write_log4j_config(folder: Path) -> Path:
    """Writes a Log4j configuration that logs to the console, and returns its path."""
    path = folder / "log4j2.properties"
    path.write_text(_LOG4J, encoding="utf-8")
    return path
