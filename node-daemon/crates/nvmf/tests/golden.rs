//! Layouts against the specifications' tables, written down by hand as byte offsets, so that they
//! do not share a misreading with the code that writes them. Base: NVM Express Base 2.0; NVM: NVM
//! Command Set 1.0; TCP: NVMe/TCP Transport 1.0.

use std::net::Ipv4Addr;

use tercet_nvmf::command::{Data, Entry};
use tercet_nvmf::fabrics::{ConnectData, ConnectEntry, capabilities};
use tercet_nvmf::identify::{self, Controller};
use tercet_nvmf::log::{self, AnaState, Counters, DiscoveryRecord, ErrorEntry};
use tercet_nvmf::names::volume_nqn;
use tercet_nvmf::pdu::{
    Common, Fatal, FatalStatus, IcReq, IcResp, PduType, Transfer, crc32c, termination,
};
use tercet_nvmf::status::Status;
use tercet_proto::VolumeId;

fn volume() -> VolumeId {
    VolumeId::from_bytes([
        0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff,
        0x01,
    ])
}

/// Asserts bytes at offsets, and zeroes at all places that are not named.
fn assert_layout(data: &[u8], fields: &[(usize, &[u8])]) {
    let mut expected = vec![0; data.len()];
    for (at, bytes) in fields {
        expected[*at..at + bytes.len()].copy_from_slice(bytes);
    }
    let wrong: Vec<usize> = (0..data.len()).filter(|&at| data[at] != expected[at]).collect();
    assert!(wrong.is_empty(), "bytes differ at offsets {wrong:?}");
}

#[test]
fn digests_are_crc32c() {
    // RFC 3720 B.4: 32 bytes of zeroes, 32 of ones, 0 to 31.
    assert_eq!(crc32c(&[0; 32]).to_le_bytes(), [0xaa, 0x36, 0x91, 0x8a]);
    assert_eq!(crc32c(&[0xff; 32]).to_le_bytes(), [0x43, 0xab, 0xa8, 0x62]);
    let counting: Vec<u8> = (0..32).collect();
    assert_eq!(crc32c(&counting).to_le_bytes(), [0x4e, 0x79, 0xdd, 0x46]);
}

#[test]
fn initialization_pdus() {
    // TCP 3.6.2.2 and 3.6.2.3: 128 bytes, PFV 9:8, xPDA 10, DGST 11, MAXR2T or MAXH2CDATA 15:12.
    let request = IcReq { format: 0, host_alignment: 3, digests: 3, r2ts_max: 7 }.to_wire();
    let head: &[u8] = &[0x00, 0, 128, 0, 128, 0, 0, 0];
    assert_layout(&request, &[(0, head), (10, &[3]), (11, &[3]), (12, &[7])]);
    let response =
        IcResp { format: 0, controller_alignment: 0, digests: 1, data_bytes_max: 0x0010_0000 };
    let head: &[u8] = &[0x01, 0, 128, 0, 128, 0, 0, 0];
    assert_layout(&response.to_wire(), &[(0, head), (11, &[1]), (14, &[0x10])]);
}

#[test]
fn transfer_pdus() {
    // TCP 3.6.2.7, 3.6.2.9: CCCID 9:8, TTAG 11:10, offset 15:12, length 19:16.
    let mut out = [0; 24];
    Common { kind: PduType::R2T, flags: 0, data_offset: 0, pdu_bytes: 24 }.put(&mut out);
    Transfer { command_id: 0x0102, tag: 0x0304, offset: 0x1000, bytes: 0x2000 }.put(&mut out);
    let fields: &[(usize, &[u8])] = &[
        (0, &[0x09, 0, 24, 0, 24]),
        (8, &[2, 1, 4, 3]),
        (12, &[0, 0x10, 0, 0]),
        (16, &[0, 0x20, 0, 0]),
    ];
    assert_layout(&out, fields);
}

#[test]
fn termination_requests() {
    // TCP 3.6.2.5: HLEN 24, FES 9:8, FEI 13:10, the PDU that caused it from 24.
    let out = termination(PduType::C2HTermReq, Fatal::header(3), &[0x77; 200]);
    assert_eq!(out.len(), 24 + 128);
    assert_eq!(out[..14], [0x03, 0, 24, 0, 152, 0, 0, 0, 1, 0, 3, 0, 0, 0]);
    assert!(out[24..].iter().all(|&byte| byte == 0x77));
    assert_eq!(FatalStatus::LimitExceeded as u16, 5);
    assert_eq!(FatalStatus::UnsupportedParameter as u16, 6);
}

#[test]
fn connect() {
    // Base 6.3: opcode 7Fh, FCTYPE 01h in byte 4, SGL1 39:24, RECFMT 41:40, QID 43:42, SQSIZE
    // 45:44, CATTR 46, KATO 51:48; data: HOSTID 15:0, CNTLID 17:16, SUBNQN 511:256, HOSTNQN
    // 767:512.
    let entry = ConnectEntry {
        format: 0,
        queue: 2,
        last_entry: 127,
        no_flow_control: true,
        keep_alive_ms: 5000,
    };
    let fields: &[(usize, &[u8])] = &[
        (0, &[0x7f, 0x40, 0x34, 0x12, 0x01]),
        (32, &[0x00, 0x04]),
        (39, &[0x01]),
        (42, &[2, 0, 127, 0, 4]),
        (48, &[0x88, 0x13]),
    ];
    assert_layout(&entry.to_entry(0x1234).0, fields);
    let data = ConnectData {
        host_id: [0xab; 16],
        cntlid: 0xffff,
        subsystem_nqn: "nqn.x".to_owned(),
        host_nqn: "nqn.y".to_owned(),
    };
    let wire = data.to_wire();
    assert_eq!(wire.len(), 1024);
    let fields: &[(usize, &[u8])] =
        &[(0, &[0xab; 16]), (16, &[0xff, 0xff]), (256, b"nqn.x"), (512, b"nqn.y")];
    assert_layout(&wire, fields);
}

#[test]
fn io_entries() {
    // NVM 3.2.6: NSID 7:4, SLBA in dwords 10 and 11, NLB 0's based in dword 12; TCP 3.3.2: SGL
    // Data Block with offset (01h) in the capsule, Transport SGL Data Block (5Ah) outside.
    let mut entry = Entry::new(0x01, 5);
    entry.set_nsid(1);
    entry.set_range(0x0001_0000_0002, 8);
    entry.set_data(Data::Transport(32768));
    let fields: &[(usize, &[u8])] = &[
        (0, &[0x01, 0x40, 5, 0]),
        (4, &[1]),
        (32, &[0, 0x80, 0, 0]),
        (39, &[0x5a]),
        (40, &[2, 0, 0, 0, 1, 0, 0, 0]),
        (48, &[7]),
    ];
    assert_layout(&entry.0, fields);
}

#[test]
fn controller_capabilities() {
    // Base 3.1.3.1: MQES 15:0, CQR 16, TO 31:24, CSS 44:37.
    assert_eq!(capabilities(128), 127 | 1 << 16 | 15 << 24 | 1 << 37);
}

#[test]
fn identify_controller() {
    let nqn = volume_nqn(volume());
    let about = Controller { subsystem_nqn: &nqn, volume: Some(volume()), cntlid: 0x1234 };
    let model = format!("{:<40}", "Tercet volume");
    let firmware = format!("{:<8}", env!("CARGO_PKG_VERSION"));
    let fields: &[(usize, &[u8])] = &[
        (4, b"112233445566778899aa"),            // SN 23:4
        (24, model.as_bytes()),                  // MN 63:24
        (64, firmware.as_bytes()),               // FR 71:64
        (76, &[0b1011]),                         // CMIC: ports, controllers, ANA
        (77, &[8]),                              // MDTS: 2^8 pages of 4 KiB
        (78, &[0x34, 0x12]),                     // CNTLID
        (80, &[0x00, 0x04, 0x01, 0x00]),         // VER 1.4.0
        (92, &[0x00, 0x09, 0, 0]),               // OAES: bits 8 and 11
        (96, &[0x41]),                           // CTRATT: 128-bit host id, TBKAS
        (111, &[1]),                             // CNTRLTYPE: I/O
        (258, &[3, 3]),                          // ACL, AERL
        (260, &[0b11]),                          // FRMW: one slot, read only
        (261, &[0b110, 15]),                     // LPA: effects log, extended data; ELPE
        (266, &[0x57, 1, 0x61, 1]),              // WCTEMP 343 K, CCTEMP 353 K
        (320, &[1, 0]),                          // KAS: 100 ms
        (342, &[10, 0b0101_0101]),               // ANATT, ANACAP
        (344, &[1, 0, 0, 0, 1, 0, 0, 0]),        // ANAGRPMAX, NANAGRPID
        (512, &[0x66, 0x44, 128, 0]),            // SQES, CQES, MAXCMD
        (516, &[1, 0, 0, 0]),                    // NN
        (520, &[0b1001_1101, 1]),                // ONCS: Compare, DSM, zeroes, Select, Verify, Copy
        (522, &[1, 0]),                          // FUSES: Compare and Write
        (525, &[0b110]),                         // VWC: none
        (526, &[255, 0, 255, 0]),                // AWUN, AWUPF: 256 blocks
        (532, &[255, 0, 1, 0]),                  // ACWU, OCFS
        (536, &[1, 0, 0x10, 0]),                 // SGLS: supported, offset
        (540, &[1]),                             // MNAN
        (768, nqn.as_bytes()),                   // SUBNQN
        (1792, &[0x04, 0x04, 0, 0, 1, 0, 0, 0]), // IOCCSZ 1028 x 16, IORCSZ
        (1800, &[0, 0]),                         // ICDOFF
        (1803, &[1, 1]),                         // MSDBD, OFCS
    ];
    assert_layout(&identify::controller(about), fields);
}

#[test]
fn identify_namespace() {
    // NVM 4.1.5.1; NGUID 119:104 is the volume's UUID, LBAF0 131:128.
    let uuid = *volume().as_bytes();
    let fields: &[(usize, &[u8])] = &[
        (0, &[0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1]), // NSZE, NCAP, NUSE
        (24, &[0b10]),                                                // NSFEAT: NAWUN and so on
        (30, &[1]),                                                   // NMIC: shared
        (33, &[0b1001]),                                              // DLFEAT
        (34, &[255, 0, 255, 0, 255, 0]),                              // NAWUN, NAWUPF, NACWU
        (74, &[0, 1, 0, 1, 0, 0, 127]),                               // MSSRL, MCL, MSRC
        (92, &[1]),                                                   // ANAGRPID
        (104, &uuid),
        (130, &[12]),
    ];
    assert_layout(&identify::namespace(volume(), 256), fields);
    // Base 5.17.2.3: type, length, two reserved bytes, identifier.
    let fields: &[(usize, &[u8])] =
        &[(0, &[2, 16]), (4, &uuid), (20, &[3, 16]), (24, &uuid), (40, &[4, 1])];
    assert_layout(&identify::descriptors(volume()), fields);
    assert_layout(&identify::namespace_list(0), &[(0, &[1])]);
    assert_layout(&identify::namespace_list(1), &[]);
    assert_layout(&identify::command_set_controller(), &[(0, &[8, 16])]);
    // Base 4.4: the number of identifiers 1:0, then they, in order.
    let list = identify::controller_list(&[1, 3, 0x1002].into(), 2);
    assert_layout(&list, &[(0, &[2, 0, 3, 0, 2, 0x10])]);
    assert_layout(&identify::independent_namespace(), &[(1, &[1]), (4, &[1]), (14, &[1])]);
}

#[test]
fn error_and_health_logs() {
    // Base 5.16.1.2: error count 7:0, SQID 9:8, CID 11:10, status 13:12 with its phase bit,
    // parameter location 15:14, LBA 23:16, NSID 27:24, TRTYPE 29; the newest entry first.
    let entry = |count| ErrorEntry {
        count,
        queue: 1,
        command: 0x0203,
        status: Status::LBA_RANGE,
        lba: 0x1122_3344_5566,
        nsid: 1,
    };
    let entries = [entry(9), entry(8)];
    let data = log::errors(entries.iter());
    assert_eq!(data.len(), 16 * 64);
    let rest: &[u8] = &[
        1, 0, 3, 2, 0x00, 0x81, 0xff, 0xff, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 0, 0, 1, 0, 0, 0,
        0, 3,
    ];
    assert_layout(&data, &[(0, &[9]), (8, rest), (64, &[8]), (72, rest)]);
    // Base 5.16.1.3.
    let counters = Counters {
        read_bytes: 512_000,
        written_bytes: 512_001,
        reads: 3,
        writes: 4,
        media_errors: 5,
        errors: 6,
    };
    let fields: &[(usize, &[u8])] = &[
        (0, &[0b10]),    // critical warning: temperature
        (1, &[0x2a, 1]), // 298 K
        (3, &[100, 10]), // spare, its threshold
        (32, &[1]),      // data units read
        (48, &[2]),      // data units written
        (64, &[3]),      // read commands
        (80, &[4]),      // write commands
        (160, &[5]),     // media errors
        (176, &[6]),     // error log entries
    ];
    assert_layout(&log::health(&counters, true), fields);
}

#[test]
fn ana_log() {
    // Base 5.16.1.13: change count 7:0, groups 9:8; group: id 3:0, NSIDs 7:4, change count 15:8,
    // state 16, NSIDs from 32.
    for (state, byte) in
        [(AnaState::Optimized, 1), (AnaState::Inaccessible, 3), (AnaState::Change, 15)]
    {
        let fields: &[(usize, &[u8])] =
            &[(0, &[5]), (8, &[1]), (16, &[1]), (20, &[1]), (24, &[5]), (32, &[byte]), (48, &[1])];
        let data = log::ana(5, state, false);
        assert_eq!(data.len(), 52);
        assert_layout(&data, fields);
        assert_eq!(log::parse_ana(&data, 1), Some(state));
        assert_eq!(log::ana(5, state, true).len(), 48);
    }
}

#[test]
fn discovery_log() {
    // Base 5.16.1.23: GENCTR 7:0, NUMREC 15:8, records from 1024: TRTYPE 0 (TCP: 3), ADRFAM 1
    // (IPv4: 1), SUBTYPE 2 (NVM: 2), TREQ 3, PORTID 5:4, CNTLID 7:6, ASQSZ 9:8, TRSVCID 63:32,
    // SUBNQN 511:256, TRADDR 767:512.
    let record = DiscoveryRecord {
        subsystem_nqn: "nqn.x".to_owned(),
        address: Ipv4Addr::new(127, 0, 1, 2).into(),
        port: 4420,
        port_id: 7,
    };
    let service = format!("{:<32}", "4420");
    let address = format!("{:<256}", "127.0.1.2");
    let data = log::discovery(9, &[&record]);
    let fields: &[(usize, &[u8])] = &[
        (0, &[9]),
        (8, &[1]),
        (1024, &[3, 1, 2, 4, 7, 0, 0xff, 0xff, 128, 0]),
        (1024 + 32, service.as_bytes()),
        (1024 + 256, b"nqn.x"),
        (1024 + 512, address.as_bytes()),
    ];
    assert_layout(&data, fields);
    assert_eq!(log::parse_discovery(&data), Some((9, vec![record])));
}
