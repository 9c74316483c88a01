"""The cluster as a map: a column per host, a box per device, coloured and numbered by stage."""

from html import escape

from launcher.autopar.clusters.hosts import AnyCluster
from launcher.autopar.pages import svg
from launcher.autopar.plans.plan import Plan

_WIDTH, _LEFT, _TOP = 1120, 8, 18  # px
_LARGEST_BOX, _LEAST_NUMBERED_BOX = 26, 13
_GOLDEN_ANGLE = 137.5  # degrees between the hues of neighbours, so that they are easy to tell


def cluster_svg(plan: Plan, cluster: AnyCluster) -> str:
    """Draw which stage has which devices, of several the first; what no stage has stays empty."""
    stage_of = {
        (host, device): index
        for index, stage in enumerate(plan.submeshes)
        for host in stage.hosts
        for device in stage.devices
    }
    box = min(_LARGEST_BOX, max(8, (_WIDTH - _LEFT) // min(cluster.num_hosts, 64) - 6))
    per_row = max(1, (_WIDTH - _LEFT) // (box + 6))
    kinds = [kind for kind in cluster.kinds for _ in range(kind.num_hosts)]
    row_height = max(kind.devices_per_host for kind in kinds) * (box + 1) + 26
    body = []
    for host, kind in enumerate(kinds):
        x = _LEFT + host % per_row * (box + 6)
        y = _TOP + host // per_row * row_height
        if box >= _LEAST_NUMBERED_BOX:
            body.append(svg.text(x + box / 2, y - 5, str(host), "faint", anchor="middle"))
        of_kind = f" ({kind.device.kind})" if len(cluster.kinds) > 1 else ""
        for device in range(kind.devices_per_host):
            place = f"host {host}{of_kind}, device {device}"
            body.append(_box(x, y + device * (box + 1), box, place, stage_of.get((host, device))))
    rows = -(-cluster.num_hosts // per_row)
    columns = min(cluster.num_hosts, per_row)
    width, height = _LEFT + columns * (box + 6), _TOP + rows * row_height - 20
    return svg.picture(width, height, "".join(body), label="stages on devices")


def _box(x: float, y: float, box: int, place: str, stage: int | None) -> str:
    if stage is None:
        return svg.rectangle(x, y, box, box, "idle", title=f"{place}: not used", round_px=2)
    hue = stage * _GOLDEN_ANGLE % 360
    fill = (
        f'<rect x="{x}" y="{y}" width="{box}" height="{box}" rx="2" fill="hsl({hue:.0f} 58% 74%)">'
        f"<title>{escape(f'{place}: stage {stage}')}</title></rect>"
    )
    if box < _LEAST_NUMBERED_BOX:
        return fill
    return fill + svg.text(x + box / 2, y + box / 2 + 3, str(stage), "on")
