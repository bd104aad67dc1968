// SPDX-License-Identifier: GPL-2.0
/*
 * Tests of IOVA space whose device leaves its domain for a while, as it does
 * around a reset. What is linked there must work again when it is back.
 *
 * The device is viommu's null device, which writes a number to an address.
 * Without one that is behind an IOMMU, the tests are skipped.
 */
#include <linux/dma-mapping.h>
#include <linux/io-64-nonatomic-lo-hi.h>
#include <linux/iommu.h>
#include <linux/iopoll.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/random.h>
#include <linux/scatterlist.h>

#include <kunit/test.h>

/* Registers */
#define REG_ADDRESS	0x00
#define REG_STATUS	0x08
#define REG_DOORBELL	0x0c

/* What STATUS reads as. Writing bit 0 makes it idle again. */
#define STATUS_DONE	2
#define STATUS_FAILED	3
#define STATUS_ACK	BIT(0)

#define TIMEOUT_US	(60 * USEC_PER_SEC)

#define NR_PAGES	7
/* For dma_map_sg(): more than two, which may be mapped one by one */
#define NR_SG		5

static struct pci_dev *null_dev;
static void __iomem *null_regs;

static void free_pages_of_test(void *data)
{
	struct page **page = data;
	unsigned int i;

	for (i = 0; i < NR_PAGES; i++)
		if (page[i])
			__free_page(page[i]);
}

/* Have the device write a number, and say whether it could */
static bool write_number(struct kunit *test, dma_addr_t addr, u32 number)
{
	u32 status = 0;
	int ret;

	lo_hi_writeq(addr, null_regs + REG_ADDRESS);
	writel(number, null_regs + REG_DOORBELL);
	ret = readl_poll_timeout(null_regs + REG_STATUS, status,
				 status >= STATUS_DONE, 100, TIMEOUT_US);
	KUNIT_EXPECT_EQ(test, 0, ret);
	writel(STATUS_ACK, null_regs + REG_STATUS);
	return status == STATUS_DONE;
}

static void expect_reached(struct kunit *test, dma_addr_t addr,
			   struct page *page)
{
	__le32 *word = page_address(page);
	u32 number = get_random_u32() | 1;

	WRITE_ONCE(*word, 0);
	KUNIT_EXPECT_TRUE(test, write_number(test, addr, number));
	KUNIT_EXPECT_EQ(test, number, le32_to_cpu(READ_ONCE(*word)));
}

static void expect_not_reached(struct kunit *test, dma_addr_t addr,
			       struct page *page)
{
	__le32 *word = page_address(page);

	WRITE_ONCE(*word, 0);
	KUNIT_EXPECT_FALSE(test, write_number(test, addr, U32_MAX));
	KUNIT_EXPECT_EQ(test, 0, le32_to_cpu(READ_ONCE(*word)));
}

/* As for a reset: another domain, in which nothing is mapped */
static void leave_domain(struct kunit *test)
{
	KUNIT_ASSERT_EQ(test, 0, iommu_device_claim_dma_owner(&null_dev->dev,
							      test));
}

static void come_back(void)
{
	iommu_device_release_dma_owner(&null_dev->dev);
}

static void alloc(struct kunit *test, struct dma_iova_state *state,
		  unsigned int nr)
{
	KUNIT_ASSERT_TRUE(test, dma_iova_try_alloc(&null_dev->dev, state, 0,
						   nr * PAGE_SIZE));
}

/* Without the wait */
static void link_page(struct kunit *test, struct dma_iova_state *state,
		      unsigned int i)
{
	struct page **page = test->priv;

	KUNIT_EXPECT_EQ(test, 0, dma_iova_link(&null_dev->dev, state,
					       page_to_phys(page[i]),
					       i * PAGE_SIZE, PAGE_SIZE,
					       DMA_FROM_DEVICE, 0));
}

static void sync(struct kunit *test, struct dma_iova_state *state,
		 unsigned int nr)
{
	KUNIT_EXPECT_EQ(test, 0, dma_iova_sync(&null_dev->dev, state, 0,
					       nr * PAGE_SIZE));
}

/*
 * What is linked is there again. This comes first: a device that is made to
 * refuse the first RELEASE has no effect on the cases after it, whose sizes are
 * not in the same cache of IOVAs.
 */
static void iova_reset_kept(struct kunit *test)
{
	struct page **page = test->priv;
	struct dma_iova_state state;
	unsigned int i, round;

	alloc(test, &state, 3);
	for (i = 0; i < 3; i++)
		link_page(test, &state, i);
	sync(test, &state, 3);
	for (round = 0; round < 3; round++) {
		for (i = 0; i < 3; i++)
			expect_reached(test, state.addr + i * PAGE_SIZE,
				       page[i]);
		leave_domain(test);
		come_back();
	}
	for (i = 0; i < 3; i++)
		expect_reached(test, state.addr + i * PAGE_SIZE, page[i]);
	dma_iova_destroy(&null_dev->dev, &state, 3 * PAGE_SIZE,
			 DMA_FROM_DEVICE, 0);
}

/* Linking and unlinking meanwhile have an effect, too */
static void iova_reset_changed(struct kunit *test)
{
	struct page **page = test->priv;
	struct dma_iova_state state;

	alloc(test, &state, NR_PAGES);
	link_page(test, &state, 0);
	link_page(test, &state, 1);
	sync(test, &state, 2);

	leave_domain(test);
	dma_iova_unlink(&null_dev->dev, &state, 0, PAGE_SIZE, DMA_FROM_DEVICE,
			0);
	link_page(test, &state, 2);
	sync(test, &state, NR_PAGES);
	come_back();

	expect_not_reached(test, state.addr, page[0]);
	expect_reached(test, state.addr + PAGE_SIZE, page[1]);
	expect_reached(test, state.addr + 2 * PAGE_SIZE, page[2]);
	dma_iova_unlink(&null_dev->dev, &state, PAGE_SIZE, PAGE_SIZE,
			DMA_FROM_DEVICE, 0);
	dma_iova_unlink(&null_dev->dev, &state, 2 * PAGE_SIZE, PAGE_SIZE,
			DMA_FROM_DEVICE, 0);
	dma_iova_free(&null_dev->dev, &state);
}

/* What is destroyed meanwhile is gone, and can be had again */
static void iova_reset_destroyed(struct kunit *test)
{
	struct page **page = test->priv;
	struct dma_iova_state state;
	dma_addr_t addr;

	alloc(test, &state, 16);
	link_page(test, &state, 0);
	sync(test, &state, 1);
	addr = state.addr;
	expect_reached(test, addr, page[0]);

	leave_domain(test);
	dma_iova_destroy(&null_dev->dev, &state, PAGE_SIZE, DMA_FROM_DEVICE, 0);
	come_back();
	expect_not_reached(test, addr, page[0]);

	alloc(test, &state, 16);
	link_page(test, &state, 0);
	sync(test, &state, 1);
	expect_reached(test, state.addr, page[0]);
	dma_iova_destroy(&null_dev->dev, &state, PAGE_SIZE, DMA_FROM_DEVICE, 0);
}

/* What is mapped in one step is there again, as it has always been */
static void iova_reset_mapped(struct kunit *test)
{
	struct device *dev = &null_dev->dev;
	struct page **page = test->priv;
	struct scatterlist sg[NR_SG];
	dma_addr_t kept, gone;
	unsigned int i;

	sg_init_table(sg, NR_SG);
	for (i = 0; i < NR_SG; i++)
		sg_set_page(&sg[i], page[i], PAGE_SIZE, 0);
	KUNIT_ASSERT_NE(test, 0, dma_map_sg(dev, sg, NR_SG, DMA_FROM_DEVICE));
	kept = dma_map_page(dev, page[NR_SG], 0, PAGE_SIZE, DMA_FROM_DEVICE);
	KUNIT_ASSERT_FALSE(test, dma_mapping_error(dev, kept));
	gone = dma_map_page(dev, page[NR_SG + 1], 0, PAGE_SIZE,
			    DMA_FROM_DEVICE);
	KUNIT_ASSERT_FALSE(test, dma_mapping_error(dev, gone));

	leave_domain(test);
	dma_unmap_page(dev, gone, PAGE_SIZE, DMA_FROM_DEVICE);
	come_back();

	expect_reached(test, kept, page[NR_SG]);
	expect_not_reached(test, gone, page[NR_SG + 1]);
	/* An IOMMU makes the pages contiguous */
	for (i = 0; i < NR_SG; i++)
		expect_reached(test, sg_dma_address(sg) + i * PAGE_SIZE,
			       page[i]);
	dma_unmap_page(dev, kept, PAGE_SIZE, DMA_FROM_DEVICE);
	dma_unmap_sg(dev, sg, NR_SG, DMA_FROM_DEVICE);
}

/* A reset of a function that has ATS, which may take it out of its domain */
static void iova_reset_flr(struct kunit *test)
{
	struct page **page = test->priv;
	struct dma_iova_state state;
	unsigned int round;

	KUNIT_EXPECT_NE(test, 0, pci_find_ext_capability(null_dev,
							 PCI_EXT_CAP_ID_ATS));
	alloc(test, &state, 2);
	link_page(test, &state, 1);
	sync(test, &state, 2);
	for (round = 0; round < 3; round++) {
		expect_reached(test, state.addr + PAGE_SIZE, page[1]);
		KUNIT_ASSERT_EQ(test, 0, pci_reset_function(null_dev));
	}
	expect_reached(test, state.addr + PAGE_SIZE, page[1]);
	dma_iova_unlink(&null_dev->dev, &state, PAGE_SIZE, PAGE_SIZE,
			DMA_FROM_DEVICE, 0);
	dma_iova_free(&null_dev->dev, &state);
}

static int iova_reset_init(struct kunit *test)
{
	struct page **page;
	unsigned int i;

	if (!null_dev)
		kunit_skip(test, "no null device");
	if (!device_iommu_mapped(&null_dev->dev))
		kunit_skip(test, "the null device is not behind an IOMMU");

	page = kunit_kcalloc(test, NR_PAGES, sizeof(*page), GFP_KERNEL);
	if (!page)
		return -ENOMEM;
	for (i = 0; i < NR_PAGES; i++)
		page[i] = alloc_page(GFP_KERNEL);
	if (kunit_add_action_or_reset(test, free_pages_of_test, page))
		return -ENOMEM;
	for (i = 0; i < NR_PAGES; i++)
		if (!page[i])
			return -ENOMEM;
	test->priv = page;
	return 0;
}

static struct kunit_case iova_reset_cases[] = {
	KUNIT_CASE(iova_reset_kept),
	KUNIT_CASE(iova_reset_changed),
	KUNIT_CASE(iova_reset_destroyed),
	KUNIT_CASE(iova_reset_mapped),
	KUNIT_CASE(iova_reset_flr),
	{}
};

static struct kunit_suite iova_reset_suite = {
	.name = "iova_reset",
	.init = iova_reset_init,
	.test_cases = iova_reset_cases,
};

kunit_test_suite(iova_reset_suite);

static int null_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	int ret;

	/* The tests use one */
	if (null_dev)
		return -EBUSY;

	ret = pcim_enable_device(pdev);
	if (ret)
		return ret;
	null_regs = pcim_iomap(pdev, 0, 0);
	if (!null_regs)
		return -ENOMEM;

	/* It is polled */
	pci_intx(pdev, 0);
	pci_set_master(pdev);
	null_dev = pdev;
	return 0;
}

static void null_remove(struct pci_dev *pdev)
{
	null_dev = NULL;
}

static const struct pci_device_id null_ids[] = {
	{ PCI_DEVICE(0x1234, 0x11e9) },
	{}
};

/* No MODULE_DEVICE_TABLE(): only who wants the tests shall get them */
static struct pci_driver null_driver = {
	.name = "iova_reset",
	.id_table = null_ids,
	.probe = null_probe,
	.remove = null_remove,
	/* The tests take the device out of its domain */
	.driver_managed_dma = true,
};

module_pci_driver(null_driver);

MODULE_DESCRIPTION("Tests of IOVA space whose device leaves its domain for a while");
MODULE_LICENSE("GPL");
