//! Bugs of mainline that part A of the series for Linux 7.3 mends and no other test holds. Each fails on the kernel
//! without the series.

use serde_json::Value;

use crate::patched::{assert_no_complaint, guest};

/// A domain that iommufd has filled before an endpoint is in it. The device takes the endpoint and then refuses the
/// mappings, so that attaching fails; the endpoint must be moved back to where the kernel takes it to be.
#[test]
fn an_endpoint_whose_mappings_are_refused_goes_back() {
    let topology = "[[dma-engine]]\naddress = \"05.0\"\n";
    let outcome = guest(topology, "vfio-map --iommufd --filled --size 4K").inject("map=inval").run();
    let result = outcome.results_of("vfio-map").next().expect("a result");
    assert_eq!(result["attached"], false);
    let told: Vec<(&str, &str, u64)> = outcome.events("request").filter_map(told).collect();
    let refused = told.iter().position(|(name, ..)| *name == "MAP").expect("a MAP");
    let (_, _, filled) = told[refused];
    let before = told[..refused].iter().rev().find(|(name, _, domain)| *name == "ATTACH" && *domain != filled);
    let &(_, _, old) = before.expect("the endpoint was in another domain");
    assert_eq!(told.get(refused + 1), Some(&("ATTACH", "OK", old)), "{told:?}");
    assert_no_complaint(&outcome);
}

/// What the device was told of domains and mappings, each with its status and the domain.
fn told(request: &Value) -> Option<(&str, &str, u64)> {
    let name = request["type"].as_str()?;
    ["ATTACH", "DETACH", "MAP"].contains(&name).then_some((
        name,
        request["status"].as_str()?,
        request["domain"].as_u64()?,
    ))
}
