//! What only Linux 6.12 does: the series' switch for mapping in one step leaves scatterlists alone, and a function is
//! attached to a domain when a driver binds to it, not when it is found.

use serde_json::json;

use super::failures::reads;
use super::{assert_no_complaint, guest};
use crate::NVME;

#[test]
fn a_scatterlist_for_which_the_device_has_no_memory_fails_the_reads() {
    let outcome = guest(NVME, "io-errors --ios 30").append("dma_iommu.oneshot=1").inject("link=nomem:after=10").run();
    let result = reads(&outcome);
    let first = result["first_failed"].as_u64().unwrap();
    assert!(first <= 10, "{result}");
    assert_eq!(result["errors"], json!({ "EIO": 30 - first }));
    assert_no_complaint(&outcome);
}

#[test]
fn a_function_without_a_domain_faults() {
    let topology = "[iommu]\nbypass = false\n[[dma-engine]]\naddress = \"05.0\"\n";
    let outcome = guest(topology, "unattached-dma").run();
    assert_no_complaint(&outcome);
    let reasons: Vec<_> = outcome.events("fault").map(|fault| fault["reason"].clone()).collect();
    assert_eq!(reasons, ["DOMAIN"]);
    assert_eq!(outcome.events("dma").count(), 0, "an access went through");
}
