"""The dashboard of tenants: who asks, who is refused, who uses how much."""

from grafana_foundation_sdk.builders.dashboard import Dashboard

from tools.monitoring.panels import HERE, Panel, Query, new_dashboard, variable

TENANT = f'{HERE},tenant=~"$tenant"'
REFUSED = f'{TENANT},status="429"'
CLIENT = f'{TENANT},status=~"4.."'
SERVER = f'{TENANT},status=~"5.."'


def rate(metric: str, by: str, matchers: str = TENANT) -> str:
    """The growth of a counter in a second, by tenant."""
    return f"sum by ({by}) (rate({metric}{{{matchers}}}[$__rate_interval]))"


PANELS = (
    Panel(
        "Requests", "By tenant.", "reqps",
        (Query(rate("phi4ray:requests_total", "tenant"), "{{tenant}}"),), 12,
    ),
    Panel(
        "Client errors", "By tenant and status.", "reqps",
        (
            Query(
                rate("phi4ray:requests_total", "tenant, status", CLIENT),
                "{{tenant}} {{status}}",
            ),
        ), 12,
    ),
    Panel(
        "Turned away (429)", "Of a tenant's requests: over its limits, or no room.", "percentunit",
        (
            Query(
                f"{rate('phi4ray:requests_total', 'tenant', REFUSED)} / "
                f"{rate('phi4ray:requests_total', 'tenant')}", "{{tenant}}",
            ),
        ), 12,
    ),
    Panel(
        "Server errors", "By tenant.", "reqps",
        (
            Query(
                rate("phi4ray:requests_total", "tenant, status", SERVER),
                "{{tenant}} {{status}}",
            ),
        ), 12,
    ),
    Panel(
        "Tokens", "In a second, by tenant and kind.", "short",
        (Query(rate("phi4ray:tokens_total", "tenant, kind"), "{{tenant}} {{kind}}"),), 12,
    ),
    Panel(
        "Tokens in all", "In the time shown, by tenant.", "short",
        (Query(f"sum by (tenant) (increase(phi4ray:tokens_total{{{TENANT}}}[$__range]))",
               "{{tenant}}"),), 12, latest=True,
    ),
)  # fmt: skip


def build() -> Dashboard:
    """Build it."""
    asked = "phi4ray:requests_total"
    return new_dashboard(
        "tenants",
        "phi4ray: tenants",
        "Who asks, who is refused, who uses how much.",
        [variable("namespace", asked), variable("tenant", asked).all_value(".*")],
        [("Tenants", PANELS)],
    )
