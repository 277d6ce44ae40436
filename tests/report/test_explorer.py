"""What the page's explorer and its accounts are made of: states of the search, the image's blocks, layers' costs, the ledger."""

import pytest
import torch
from made_up import SITES, Tags, changed, gates, made_up_run, numbers_in, page_of, save
from runs import records

from dnal_dist import nets
from dnal_dist.nets import cost
from dnal_dist.report import diagram, explorer, tables
from dnal_dist.report.records import Run, load, result_of

SMALL = ("vgg_digits", "resnet_digits", "supernet_digits")


def run_of(folder, records: list[dict], recipe: str = "name: digits\n") -> Run:
    return load(save(folder, records, recipe=recipe))


@pytest.mark.parametrize("name", SMALL)
def test_costs_of_layers_add_up_to_the_network(name):
    net, draws = nets.build(name), torch.Generator().manual_seed(3)
    for share in (1.0, 0.5, 0.02):
        keep = torch.rand(net.num_gates, generator=draws) < share
        layers = cost.of_layers(net, 8, keep)
        assert list(layers) == list(net.graph.layers)
        for which, whole in (("full", cost.count(net, 8)), ("compact", cost.count(net, 8, keep))):
            assert sum(layer[which]["macs"] for layer in layers.values()) == whole.macs
            assert sum(layer[which]["params"] for layer in layers.values()) == whole.params


def test_shortcuts_are_the_blocks_with_a_way_around_them():
    assert nets.build("vgg_digits").shortcuts() == []
    assert nets.build("resnet_digits").shortcuts() == [f"stages.{s}.{b}" for s in range(3) for b in range(2)]
    assert nets.build("supernet_digits").shortcuts() == ["stages.0.cells.1", "stages.1.cells.1"]
    with torch.device("meta"):
        wide, small = nets.build("mobilenetv2_imagenet"), nets.build("mobilenetv2_cifar")
    # Blocks with stride 1 that keep their width; the small network has 1x1 convolutions around those that change it.
    assert wide.shortcuts() == [f"blocks.{b}" for b in (2, 4, 5, 7, 8, 9, 11, 12, 14, 15)]
    assert set(small.shortcuts()) - set(wide.shortcuts()) == {"blocks.0", "blocks.1", "blocks.10", "blocks.16"}


@pytest.mark.parametrize("name", nets.NETWORKS)
def test_every_site_is_in_one_box_of_the_image(name):
    with torch.device("meta"):
        net = nets.build(name)
    blocks = diagram.blocks(list(net.gate_sites))
    assert [i for block in blocks for box in block.boxes for i in box.sites] == list(range(len(net.gate_sites)))
    assert set(net.shortcuts()) <= {block.name for block in blocks}
    for block in blocks:
        assert not block.stacked or (len(block.boxes) == 6 and {len(box.sites) for box in block.boxes} == {2})
    cells = {"supernet_digits": 4, "proxyless_supernet": 21}.get(name, 0)
    assert sum(block.stacked for block in blocks) == cells


def test_a_real_run_records_everything_the_page_shows(finished):
    prune, start = records(finished, "prune")[0], records(finished, "start")[0]
    assert start["shortcuts"] == []
    for which in ("full", "compact"):
        for key in ("macs", "params"):
            assert sum(layer[which][key] for layer in prune["layers"].values()) == prune[which]["exact"][key]
    numbers = numbers_in((finished / "report.html").read_text("utf-8"))["explorer"]
    assert numbers["channels"] == list(start["sites"].values())
    assert numbers["frames"][-1]["open"] == list(prune["kept"].values())
    for frame in numbers["frames"]:
        assert [sum(counts) for counts in frame["counts"]] == numbers["channels"]
    text = " ".join(Tags((finished / "report.html").read_text("utf-8")).text)
    assert start["host"] in text and records(finished, "receipt")[-1]["digest"] in text


def test_states_go_through_the_search_to_the_pruned_network(tmp_path):
    by_site = {site: [channels, *[0] * 9] for site, channels in SITES.items()}
    run = run_of(tmp_path, changed(made_up_run(), "gates", by_site=by_site), "phases: {search: {epochs: 3}}\n")
    found = explorer.frames(run)
    assert [frame["words"] for frame in found] == [
        "epoch 0 of 3, delta 1: 3 of 40 gates open",
        "epoch 1 of 3, delta 100: 3 of 40 gates open",
        "epoch 2 of 3, delta 10,000: 3 of 40 gates open",
        "after pruning: 5 of 40 channels kept",
    ]
    assert [frame["open"] for frame in found] == [[1, 1, 1]] * 3 + [[1, 4, 0]]
    assert all(frame["counts"] == list(by_site.values()) for frame in found)


def test_a_histogram_that_is_not_whole_is_not_shown(tmp_path):
    for number, by_site in enumerate([{"conv0": [8, *[0] * 9]}, {site: [1, 2] for site in SITES}, 7]):
        found = explorer.frames(run_of(tmp_path / str(number), changed(made_up_run(), "gates", by_site=by_site)))
        assert len(found) == 4 and not any("counts" in frame for frame in found)


def test_a_long_search_is_shown_from_its_first_to_its_last_record(tmp_path):
    many = [gates(0, 0) | {"step": step, "epoch": step / 10, "open": {"conv0": step % 9}} for step in range(1001)]
    found = explorer.frames(run_of(tmp_path, [made_up_run()[0], *many]))
    assert len(found) == 240 and len({len(state["open"]) for state in found}) == 1
    assert (found[0]["words"][:8], found[-1]["words"][:9]) == ("epoch 0,", "epoch 100")


def test_before_the_search_every_channel_is_there(tmp_path):
    run = run_of(tmp_path, made_up_run()[:2])
    assert explorer.frames(run) == [{"words": "before the search", "open": [8, 16, 16]}]
    assert "the search has not begun" in page_of(tmp_path)
    assert explorer.numbers(run_of(tmp_path / "bare", [{"kind": "warning", "message": "m"}])) is None


def test_the_usage_table_has_each_phase_and_sums_what_all_have(tmp_path):
    used = {"images": 640, "device_seconds": 7200.0, "bytes_sent": 3_200_000}
    records = changed(made_up_run(), "phase", **used)
    text = " ".join(Tags(page_of(save(tmp_path, records))).text)
    assert "energy" not in text and "2 h 00 min" in text.replace("\xa0", " ") and "9.6 MB" in text.replace("\xa0", " ")
    # The run's last word counts, and a column that one phase does not tell has no sum.
    ledger = {"pretrain": used | {"energy_kwh": 0.5}, "search": used, "finetune": {"images": 1}}
    run = run_of(tmp_path, changed(records, "end", ledger=ledger))
    result = result_of(run)
    assert tables.usage_of_phases(run, result)["finetune"] == {"seconds": 40.0, "images": 1}
    text = " ".join(cell for row in tables.usage(run, result).rows for cell in row)
    assert "0.5 kWh" in text and text.count("kWh") == 1
    assert "1,281" in text


def test_older_runs_have_times_alone(tmp_path):
    run = run_of(tmp_path, made_up_run())
    assert tables.usage_of_phases(run, result_of(run))["search"] == {"seconds": 30.0}
    text = " ".join(Tags(page_of(tmp_path)).text)
    assert "device time" not in text and "sent by each process" not in text and "30.0" in text


def test_every_start_and_every_receipt_is_shown(tmp_path):
    records = made_up_run()
    again = records[0] | {"resumed": True, "global_step": 50, "time": 1_790_086_400, "host": "node9", "world_size": 4}
    again |= {"slurm_job": "4711", "code": "0123456789abcdef" * 2 + "01234567+", "changed": {"training.compile": [False, True]}}
    skipped = [[n, "train-3.tar", 512 * n, f"{n:05d}", "<truncated>"] for n in (4, 9)]
    receipt = {
        "kind": "receipt",
        "global_step": 90,
        "epoch": 3,
        "batches": 22,
        "samples": 1406,
        "digest": "ab12",
        "ordered": "cd34",
    }
    save(tmp_path, [*records[:8], again, *records[8:], receipt | {"samples": 9}, receipt | {"skipped": skipped}])
    text = " ".join(" ".join(Tags(page_of(tmp_path)).text).replace("\xa0", " ").split())
    assert "started 0" in text and "resumed 50 node9 4 x CPU ddp 4711 0123456789ab+ training.compile: False -> True" in text
    assert "2026-09-22 14:13:20 UTC" in text
    assert "1,406 samples in 1 pass, skipped: 2" in text and "3 22 1,406 2 ab12 cd34" in text
    assert "9 train-3.tar 4608 00009 <truncated>" in text


def test_a_page_of_many_sites_stays_light(tmp_path):
    sites = {f"stages.{i // 48}.cells.{i // 12 % 4}.k3e3.layer{i % 12}": 96 for i in range(255)}
    look = {"by_site": {site: [48, *[0] * 8, 48] for site in sites}, "open": dict.fromkeys(sites, 48)}
    many = [gates(0, 0) | look | {"step": step, "epoch": float(step)} for step in range(400)]
    page = page_of(save(tmp_path, [made_up_run()[0] | {"sites": sites}, *many]))
    assert len(page) < 1_000_000
    frames = numbers_in(page)["explorer"]["frames"]
    assert 24 < len(frames) < 240 and (frames[0]["words"][:8], frames[-1]["words"][:10]) == ("epoch 0,", "epoch 399,")
