use super::*;

fn parse(text: &str) -> Result<Topology, String> {
    Topology::parse(text, "test.toml").map_err(|error| error.to_string())
}

fn refused(text: &str, wanted: &[&str]) {
    let error = parse(text).unwrap_err();
    for part in wanted {
        assert!(error.contains(part), "{part:?} is not in: {error}");
    }
}

#[test]
fn endpoints_get_the_ids_that_firmware_will_give() {
    let topology = parse(
        r#"
        [[root-port]]
        name = "second"
        address = "07.0"
        [[root-port]]
        name = "first"
        address = "06.0"
        [[nvme]]
        address = "04.0"
        image = "a.img"
        [[nvme]]
        address = "00.0"
        behind = "second"
        hotplug = true
        image = "b.img"
        [[dma-engine]]
        address = "05.0"
        "#,
    )
    .unwrap();
    let ids: Vec<_> = topology.endpoints.iter().map(|e| (e.name.as_str(), e.bdf.to_string(), e.bdf.id())).collect();
    assert_eq!(
        ids,
        [
            ("nvme0", "0000:00:04.0".to_string(), 0x20),
            ("nvme1", "0000:02:00.0".to_string(), 0x200),
            ("dma0", "0000:00:05.0".to_string(), 0x28),
        ]
    );
}

#[test]
fn the_split_protocol_can_be_switched_off() {
    let endpoint = "[[dma-engine]]\naddress = \"05.0\"";
    assert!(parse(endpoint).unwrap().settings().split);
    assert!(!parse(&format!("[iommu]\nsplit = false\n{endpoint}")).unwrap().settings().split);
    refused("[iommu]\nsplit = 0\n", &["line 2", "boolean"]);
}

#[test]
fn the_viot_names_the_iommu_and_each_endpoint() {
    let topology = parse("[[nvme]]\naddress = \"04.0\"\nimage = \"a\"\n[[dma-engine]]\naddress = \"05.0\"").unwrap();
    let table = viot::table(&topology);
    assert_eq!(&table[..4], b"VIOT");
    assert_eq!(table.len(), 48 + 16 + 2 * 24);
    assert_eq!(table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
    // The IOMMU's node has type 3, and its BDF is at offset 6. The endpoints' have type 1, and the endpoint id is at 4.
    assert_eq!((table[48], u16::from_le_bytes([table[54], table[55]])), (3, 0x18));
    assert_eq!((table[64], table[68]), (1, 0x20));
    assert_eq!((table[88], table[92]), (1, 0x28));
}

#[test]
fn errors_name_line_key_and_expectation() {
    refused("", &["test.toml", "[[nvme]]"]);
    refused("[[nvme]]\naddress = \"04.0\"", &["line 1", "missing field `image`"]);
    refused("[[nvme]]\naddress = \"04.9\"\nimage = \"a\"", &["line 2", "\"04.9\"", "expected"]);
    refused("[[nvme]]\nadress = \"04.0\"\nimage = \"a\"", &["line 2", "unknown field `adress`", "`address`"]);
    refused("[[nvme]]\naddress = \"03.0\"\nimage = \"a\"", &["line 2", "`address`", "taken by \"iommu\""]);
    refused("[[nvme]]\naddress = \"1f.0\"\nimage = \"a\"", &["line 2", "chipset"]);
    refused("[[nvme]]\naddress = \"00.0\"\nbehind = \"rp\"\nimage = \"a\"", &["line 3", "`behind`", "there is none"]);
    refused(
        "[[nvme]]\naddress = \"04.0\"\nblock-size = 520\nimage = \"a\"",
        &["line 3", "`block-size`", "512 or 4096"],
    );
    refused("[[nvme]]\naddress = \"04.0\"\nname = \"a/b\"\nimage = \"a\"", &["line 3", "`name`"]);
    let twice = "[[nvme]]\naddress = \"04.0\"\nimage = \"a\"\n[[nvme]]\naddress = \"05.0\"\nimage = \"a\"";
    refused(twice, &["line 6", "`image`", "\"nvme0\"", "its own"]);
    for name in ["qmp", "trace", "viommu", "viommu-serial"] {
        let named = format!("[[nvme]]\naddress = \"04.0\"\nname = \"{name}\"\nimage = \"a\"");
        refused(&named, &["line 3", "`name`", "viommu's own"]);
    }
    let serial = "[[nvme]]\naddress = \"04.0\"\nimage = \"a\"\nserial = \"abcdefghijklmnopqrstuvwxyz\"";
    refused(serial, &["line 4", "`serial`", "1 to 20"]);
    refused("[[root-port]]\nname = \"a,b\"\naddress = \"06.0\"", &["line 2", "`name`", "a letter and then"]);
    let ports = "[[root-port]]\nname = \"a\"\naddress = \"06.0\"\n";
    refused(&format!("{ports}{}", ports.replace("06", "07")), &["line 5", "`name`", "taken"]);
    refused("[[nvme]]\naddress = \"04.0\"\nhotplug = true\nimage = \"a\"", &["`hotplug`", "`behind`"]);
    refused("[machine]\nmemory = 5\n", &["line 2", "key `memory`", "string"]);
    refused("[machine]\nmemory = \"5X\"\n", &["line 2", "key `memory`", "\"512M\""]);
    refused("[machine]\nvcpus = 0\n", &["line 2", "key `vcpus`", "nonzero"]);
    refused("[machine]\n[[nvme]\n", &["line 2, column 8", "[[nvme]\n", "expected `]`"]);
    refused("[[nvme]\n", &["line 1, column 8", "expected `]`"]);
    refused("= 1\n", &["line 1, column 1"]);
    refused("[[nvme]]\naddress = \"04.0", &["line 2", "key `address`"]);
}

#[test]
fn an_image_is_known_under_all_its_names() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("a.img"), "").unwrap();
    std::fs::write(path("b.img"), "").unwrap();
    std::os::unix::fs::symlink(path("a.img"), path("link.img")).unwrap();
    std::fs::hard_link(path("a.img"), path("hard.img")).unwrap();
    std::fs::create_dir(path("sub")).unwrap();
    let two = |one: &str, other: &str| {
        format!("[[nvme]]\naddress = \"04.0\"\nimage = {one:?}\n[[nvme]]\naddress = \"05.0\"\nimage = {other:?}\n")
    };
    for other in ["./a.img", "link.img", "hard.img", "sub/../a.img"] {
        refused(&two(&path("a.img"), &path(other)), &["line 6", "key `image`", other, "of \"nvme0\"", "its own"]);
    }
    assert!(parse(&two(&path("a.img"), &path("b.img"))).is_ok());
    // The images that `--create-images` is to make.
    refused(&two("none.img", "./none.img"), &["line 6", "of \"nvme0\""]);
    assert!(parse(&two("none.img", &path("none.img"))).is_ok());
    assert!(parse(&two(&path("a.img"), "none.img")).is_ok());
}

#[test]
fn an_endpoint_alone_is_a_topology() {
    let topology = Topology::of_endpoint("nvme,address=04.0,image=a \"b\".img,block-size=4096").unwrap();
    assert_eq!(topology.endpoints.len(), 1);
    assert_eq!(topology.endpoints[0].bdf.id(), 0x20);
    assert_eq!(topology.endpoints[0].model.name, "nvme");
    let configuration = &topology.endpoints[0].configuration;
    assert_eq!(configuration.own_file().unwrap().path.to_str(), Some("a \"b\".img"));
    assert!(format!("{configuration:?}").contains("block_size: 4096"), "{configuration:?}");
    assert!(Topology::of_endpoint("dma-engine,address=05.0").is_ok());
}

#[test]
fn errors_of_an_endpoint_alone_name_its_keys_and_no_lines() {
    let floppy = format!("\"floppy\" is no device model; {} was expected", alternatives(|model| model.name.into()));
    for (text, wanted) in [
        ("nvme,address", "\"address\" was found where KEY=VALUE was expected"),
        ("floppy,address=04.0", floppy.as_str()),
        ("", "\"\" is no device model"),
        ("nvme,address=04.0", "missing field `image`"),
        ("nvme", "missing field `address`"),
        ("nvme,adress=04.0,image=a", "key `adress`: unknown field `adress`"),
        ("nvme,image=a,address=04.9", "key `address`: \"04.9\" is not a PCI address"),
        ("nvme,image=a,address=03.0", "key `address`: 03.0 is taken by \"iommu\""),
        ("nvme,image=a,address=04.0,block-size=big", "key `block-size`: \"big\" is no number of bytes"),
        ("nvme,image=a,address=04.0,block-size=520", "key `block-size`: 520 is not supported; 512 or 4096"),
        ("nvme,image=a,address=04.0,image=b", "duplicate key"),
        ("nvme,image=a,address=00.0,behind=rp", "key `behind`: root ports"),
        ("nvme,image=a,address=04.0,name=a/b", "key `name`: \"a/b\" cannot be a name"),
    ] {
        let error = Topology::of_endpoint(text).unwrap_err().to_string();
        assert!(error.starts_with(&format!("Cannot use --endpoint {text}: ")), "{error}");
        assert!(error.contains(wanted), "{wanted:?} is not in: {error}");
        assert!(!error.contains("line") && !error.contains('\n'), "{error}");
    }
}

#[test]
fn the_ready_topologies_are_valid() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("qemu-configs");
    let mut seen = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        Topology::load(&entry.unwrap().path()).unwrap();
        seen += 1;
    }
    assert!(seen >= 4, "{seen} topologies");
}

/// The arguments of `-device`, one for each device.
fn devices(topology: &Topology) -> Vec<String> {
    let args = qemu::devices(topology, &qemu::Paths { iommu: "viommu.sock".into() });
    args.windows(2).filter(|pair| pair[0] == "-device").map(|pair| pair[1].clone()).collect()
}

fn endpoint(model: &str, address: &str) -> String {
    let image = if model == "nvme" { format!("image = \"{address}.img\"\n") } else { String::new() };
    format!("[[{model}]]\naddress = \"{address}\"\n{image}")
}

#[test]
fn the_first_of_several_functions_says_that_there_are_more() {
    let alone = parse(&endpoint("nvme", "04.0")).unwrap();
    assert!(devices(&alone).iter().all(|device| !device.contains("multifunction")));
    let many = [
        endpoint("nvme", "04.1"),
        endpoint("nvme", "04.0"),
        endpoint("dma-engine", "03.1"),
        "[[root-port]]\nname = \"a\"\naddress = \"05.0\"\n".into(),
        "[[root-port]]\nname = \"b\"\naddress = \"05.3\"\n".into(),
        endpoint("nvme", "00.0") + "behind = \"a\"\n",
        endpoint("nvme", "00.7") + "behind = \"a\"\n",
        endpoint("nvme", "00.0").replace("00.0.img", "b.img") + "behind = \"b\"\n",
    ];
    let many = parse(&many.concat()).unwrap();
    let found: Vec<bool> = devices(&many).iter().map(|device| device.contains("multifunction")).collect();
    // The IOMMU, both root ports, the controllers in the order of the file, the DMA engine.
    assert_eq!(found, [true, true, false, false, true, true, false, false, false]);
    assert!(devices(&many)[0].ends_with(",addr=03.0,multifunction=on"));
    let first: serde_json::Value = serde_json::from_str(&devices(&many)[4]).unwrap();
    assert_eq!(first["multifunction"], true);
}

#[test]
fn a_function_that_no_guest_looks_for_is_refused() {
    refused(&endpoint("nvme", "04.1"), &["line 2", "`address`", "04.0", "no guest looks for \"nvme0\" at 04.1"]);
    refused(&format!("[iommu]\naddress = \"03.2\"\n{}", endpoint("nvme", "04.0")), &["line 2", "\"iommu\" at 03.2"]);
    let port = "[[root-port]]\nname = \"rp\"\naddress = \"06.0\"\n";
    refused(&format!("{port}{}behind = \"rp\"\n", endpoint("nvme", "00.1")), &["line 5", "no guest looks"]);
    refused(&port.replace("06.0", "06.1"), &["line 3", "\"rp\" at 06.1"]);
    let twice = format!("{port}{0}behind = \"rp\"\n{0}behind = \"rp\"\n", endpoint("nvme", "00.0"));
    refused(&twice.replacen("00.0.img", "a.img", 1), &["line 9", "taken by \"nvme0\""]);
}

#[test]
fn what_can_be_unplugged_has_no_msix_unless_it_is_wanted() {
    let port = "[[root-port]]\nname = \"rp\"\naddress = \"06.0\"\n";
    let behind = format!("{port}{}behind = \"rp\"\n", endpoint("nvme", "00.0"));
    for (keys, msix) in [("", true), ("hotplug = true\n", false), ("hotplug = true\nmsix = true\n", true)] {
        assert_eq!(parse(&format!("{behind}{keys}")).unwrap().endpoints[0].msix, msix, "{keys}");
    }
    assert!(parse(&endpoint("dma-engine", "05.0")).unwrap().endpoints[0].msix);
    assert!(!Topology::of_endpoint("dma-engine,address=05.0,msix=false").unwrap().endpoints[0].msix);
    let error = Topology::of_endpoint("dma-engine,address=05.0,msix=no").unwrap_err().to_string();
    assert!(error.contains("key `msix`: \"no\" was found where true or false was expected"), "{error}");
}

#[test]
fn a_function_has_ats_only_if_it_is_wanted() {
    let table = endpoint("dma-engine", "05.0");
    for (keys, ats) in [("", false), ("ats = false\n", false), ("ats = true\n", true)] {
        assert_eq!(parse(&format!("{table}{keys}")).unwrap().endpoints[0].ats, ats, "{keys}");
    }
    assert!(Topology::of_endpoint("null,address=05.0,ats=true").unwrap().endpoints[0].ats);
    refused(&format!("{table}ats = 1\n"), &["line 3", "`ats`", "boolean"]);
}

#[test]
fn what_is_no_model_or_no_key_of_one_is_named_with_what_is_known() {
    refused("[machine]\n[[floppy]]\naddress = \"04.0\"", &["line 2, column 3", "`floppy`", "`machine`", "`root-port`"]);
    for model in MODELS {
        refused("[[floppy]]\n", &["line 1", &format!("`{}`", model.name)]);
        let table = format!("[[{}]]\naddress = \"04.0\"\ncolour = 5", model.name);
        refused(&table, &["line 3, column 1", "unknown field `colour`", "`behind`"]);
        for key in model.keys {
            refused(&table, &[&format!("`{}`", key.name)]);
        }
        refused(&table.replace("[[", "[").replace("]]", "]"), &["line 1", &format!("[[{}]]", model.name)]);
    }
}

#[test]
fn every_model_has_an_example_and_can_be_hot_added_behind_a_root_port() {
    let port = "[[root-port]]\nname = \"rp\"\naddress = \"06.0\"\n";
    for model in MODELS {
        let option = Topology::of_endpoint(&format!("{},address=04.0,{}", model.name, model.example)).unwrap();
        assert_eq!(option.endpoints[0].name, format!("{}0", model.endpoint_name));
        let table = endpoint_table(&format!("{},address=00.0,{}", model.name, model.example)).unwrap();
        let behind = parse(&format!("{port}{table}behind = \"rp\"\nhotplug = true\n")).unwrap();
        assert_eq!((behind.endpoints[0].bdf.id(), behind.endpoints[0].hotplug), (0x100, true));
    }
}
